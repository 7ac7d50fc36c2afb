"""What importing the package puts on top of PEFT and transformers: loading that succeeds as a whole or not at all."""
