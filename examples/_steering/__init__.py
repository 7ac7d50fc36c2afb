"""Composing a vision-language model, adapting it by a method's name, and measuring what that did."""
