"""A world of coloured shapes on a grid: images, questions about them, and a tiny LLaVA that answers them."""
