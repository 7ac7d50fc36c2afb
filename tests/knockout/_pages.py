"""Records to make pages of, and text that would break out of one."""

import numpy as np


LAYERS, PAIRS = 3, ("image:question", "question:last")
NASTY = "</script><script>document.title='stolen'</script> <img src=x onerror=alert(1)> & \u2028"


def records(samples, pairs=PAIRS, seed=0):
    generator = np.random.default_rng(seed)
    return [
        {"sample": name, "pair": pair, "layer": layer, "change_percent": float(generator.normal(-20, 9)), "window": 1}
        for name in samples
        for pair in pairs
        for layer in range(LAYERS)
    ]
