"""Connection to PEFT and transformers: registration, configs, files. Knows no tuner."""
