"""The tasks' gradients of one optimiser step: collected pass by pass, compared, combined, written back."""
