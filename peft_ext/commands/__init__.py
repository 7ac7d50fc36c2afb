"""The subcommands of `peft-ext`: their options, which need no torch. The work is imported when it is run."""
