"""How the package lives inside PEFT and transformers: registration, configs, files. Knows no tuner."""
