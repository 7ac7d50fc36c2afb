"""`python -m peft_ext.autoload --enable`: let PEFT find our methods without `import peft_ext`."""

from .install.autoload import disable, enable, main, status


__all__ = ["disable", "enable", "status"]

if __name__ == "__main__":
    main()
