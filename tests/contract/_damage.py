"""Ways to damage a saved adapter, each a function of its folder."""

import json

import torch
from safetensors.torch import load_file, save_file


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def cut(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) * 2 // 3])


def cut_in_the_header(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])


def empty(folder):
    (folder / WEIGHTS).write_bytes(b"")


def flip_a_bit(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-len(content) // 3] ^= 0x10
    (folder / WEIGHTS).write_bytes(content)


def without_weights(folder):
    (folder / WEIGHTS).unlink()


def cut_config(folder):
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text[: len(text) // 2])


def options(**changes):
    """Other options in the config."""

    def damage(folder):
        (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **changes}))

    return damage


def edit(change, file=WEIGHTS):
    """Another tool rewrites the file: without our checksum, and not as it was."""

    def damage(folder):
        tensors = load_file(folder / file)
        change(tensors)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / file, {"format": "pt"})

    return damage


def drop(key, file=WEIGHTS):
    return edit(lambda tensors: tensors.pop(key), file)


def replace(key, function):
    return edit(lambda tensors: tensors.update({key: function(tensors[key])}))


def add(key, tensor):
    return edit(lambda tensors: tensors.update({key: tensor}))


def cast(dtype):
    return edit(lambda tensors: tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()}))


def with_number(value, place=0):
    """A change of one number of a tensor."""

    def change(tensor):
        tensor.view(-1)[place] = value
        return tensor

    return change


def as_wide(change):
    """A change of indices that their narrow type has no room for."""

    def changed(indices):
        return change(indices.to(torch.int32))

    return changed
