"""Ways of loading an adapter, each a function of a model and the adapter's folder; the adapted model is returned."""

from peft import PeftModel

from peft_ext import hotswap_adapter


def by_peft(base, folder, **options):
    return PeftModel.from_pretrained(base, folder, **options)


def in_little_memory(base, folder):
    return by_peft(base, folder, low_cpu_mem_usage=True)


def by_transformers(base, folder, **options):
    base.load_adapter(str(folder), **options)
    return base


def as_a_second(model, folder):
    """Beside an adapter, by PEFT or by transformers."""
    model.load_adapter(str(folder), adapter_name="second")
    model.set_adapter("second")
    return model


def again(model, folder):
    model.load_adapter(folder, "default")
    return model


def swapped(model, folder):
    hotswap_adapter(model, str(folder))
    return model
