"""Options of MoReS."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...hf.config import SavedConfig
from ...hf.registration import peft_type
from ...sparse.checks import check_count, check_flag
from .selection import GROUPINGS, SELECTIONS, parse_positions
from .steering import INITIALISATIONS


MORES = peft_type("mores")
SITES = ("layers", "connector")
CONNECTOR_MODES = ("frozen", "train")


@dataclass
class MoReSConfig(SavedConfig):
    """
    Configuration of [`MoReSModel`]: steer some tokens' hidden states in a subspace of rank r,
    h' = h + R(W h + b − Rᵀh) with RᵀR = I (Bi et al., LLaVA Steering, eqs. 3–4); the model itself stays frozen.

    The defaults are the paper's: rank 1, one percent of the visual tokens, the first and the last ones. Unlike the
    published code, they start as the identity and leave out the last layer.

    Args:
        rank (`int`, *optional*, defaults to 1):
            r, the dimension of the subspace. `2·D·r` numbers are trained per layer, and r of the bias.
        token_ratio (`float`, *optional*, defaults to 0.01):
            Share of each image's tokens that is steered, in (0, 1]; at least one token.
        token_selection (`str`, *optional*, defaults to `"ends"`):
            Which ones: `"ends"` (first and last, the published recipe), `"first"`, `"last"`, `"uniform"` (evenly
            spread), `"random"` (drawn once by `seed`) or `"all"`.
        token_grouping (`str`, *optional*, defaults to `"image"`):
            Of what `token_ratio` is a share: `"image"`, of each run of neighbouring visual tokens (an image, or one of
            its tiles); `"sample"`, of a sample's visual tokens together.
        token_positions (`str`, *optional*):
            Steer text instead: `"f7+l7"` is the first and the last seven tokens of the prompt. With `rank=8` and
            `layers_to_transform="all"` this is LoReFT (Wu et al., 2024), with one module for both ends of a layer.
            The prompt is generate()'s, or what precedes the first label, or all that a call passes; one token that
            follows it in a cache continues it. Cache a prompt's beginning inside [`unfinished_prompt`]. `token_ratio`
            and `token_selection` then have no meaning.
        layers_to_transform (`list[int]`, `int` or `str`, *optional*):
            Decoder layers to steer after, counted from 0, negative ones from the end, or `"all"`. By default all but
            the last for visual tokens, since what they become after the last layer reaches no output; all for
            `token_positions`.
        site (`str`, *optional*, defaults to `"layers"`):
            `"layers"`: after decoder layers. `"connector"`: the connector's output, all visual tokens, so that
            `token_ratio` must be 1.0; this is linear in every visual embedding and can be merged.
        dropout (`float`, *optional*, defaults to 0.0):
            On the update, in training only.
        tie_projections (`bool`, *optional*, defaults to `True`):
            One matrix R down and up, as in the published code. `False` trains a second orthonormal one to project
            down (`3·D·r` numbers).
        init (`str`, *optional*, defaults to `"identity"`):
            `"identity"` changes nothing at first. `"random"` draws W and b as for `nn.Linear`, as the published code
            does, which disturbs each steered token at first.
        steering_bias (`bool`, *optional*, defaults to `True`):
            Whether b is there.
        connector (`str`, *optional*, defaults to `"frozen"`):
            `"train"` also trains the whole connector, as the published recipe does, and saves it with the adapter.
        seed (`int`, *optional*, defaults to 0):
            Of `token_selection="random"`.
        target_modules (`list[str]`, *optional*):
            Filled in: the steered modules by name.
        modules_to_save (`list[str]`, *optional*):
            Further modules trained and saved whole.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Tokens whose embeddings are trained too, as in PEFT.
        peft_ext_version, requires: see [`~peft_ext.hf.config.SavedConfig`].

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_ext import MoReSConfig

        >>> model = get_peft_model(llava, MoReSConfig(rank=1))
        ```
    """

    rank: int = field(default=1, metadata={"help": "Dimension of the subspace."})
    token_ratio: float = field(default=0.01, metadata={"help": "Share of each image's tokens that is steered."})
    token_selection: str = field(default="ends", metadata={"help": "ends, first, last, uniform, random or all."})
    token_grouping: str = field(default="image", metadata={"help": "Share of what: image or sample."})
    token_positions: str | None = field(default=None, metadata={"help": "Steer prompt tokens instead, as 'f7+l7'."})
    layers_to_transform: list[int] | int | str | None = field(
        default=None, metadata={"help": "Decoder layers to steer after, or 'all'; None: all but the last."}
    )
    site: str = field(default="layers", metadata={"help": "layers or connector."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the update, in training."})
    tie_projections: bool = field(default=True, metadata={"help": "One matrix projects down and up."})
    init: str = field(default="identity", metadata={"help": "identity or random."})
    steering_bias: bool = field(default=True, metadata={"help": "Whether the subspace's map has a bias."})
    connector: str = field(default="frozen", metadata={"help": "frozen or train."})
    seed: int = field(default=0, metadata={"help": "Seed of token_selection='random'."})
    target_modules: list[str] | set[str] | None = field(
        default=None, metadata={"help": "Filled in; the steered modules."}
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained too."}
    )

    def __post_init__(self) -> None:
        self.peft_type = MORES
        super().__post_init__()
        self._check()
        if self.target_modules is not None:
            self.target_modules = set(self.target_modules)

    def _check(self) -> None:
        check_count("rank", self.rank)
        if type(self.token_ratio) not in (int, float) or not 0.0 < self.token_ratio <= 1.0:
            raise ValueError(f"token_ratio={self.token_ratio!r} must be a number in (0, 1]: 0.01 is one percent.")
        if type(self.dropout) not in (int, float) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout!r} must be a number in [0, 1).")
        if type(self.seed) is not int:
            raise ValueError(f"seed={self.seed!r} must be a whole number.")
        for name in ("tie_projections", "steering_bias"):
            check_flag(name, getattr(self, name))
        for name, known in (
            ("token_selection", SELECTIONS),
            ("token_grouping", GROUPINGS),
            ("site", SITES),
            ("init", INITIALISATIONS),
            ("connector", CONNECTOR_MODES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(known)}.")
        if self.token_positions is not None:
            parse_positions(self.token_positions)
        self._check_layers()
        if self.site == "connector":
            self._check_connector()
        if isinstance(self.target_modules, str):
            raise ValueError(
                f"target_modules={self.target_modules!r}: MoReS finds the decoder layers itself; choose among them "
                "with layers_to_transform."
            )

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None or layers == "all" or type(layers) is int:
            return
        if not isinstance(layers, (list, tuple, set)) or not layers or any(type(n) is not int for n in layers):
            raise ValueError(
                f"layers_to_transform={layers!r} must be a layer's number, a list of them, 'all', or None for all but "
                "the last."
            )
        self.layers_to_transform = list(layers)

    def _check_connector(self) -> None:
        if self.token_ratio != 1.0:
            raise ValueError(
                f"site='connector' steers every visual embedding, but token_ratio={self.token_ratio}; pass "
                "token_ratio=1.0, or site='layers' to steer some tokens."
            )
        if self.token_positions is not None:
            raise ValueError(
                f"token_positions={self.token_positions!r} names text tokens, which do not pass the connector; use "
                "site='layers'."
            )
        if self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} has no meaning with site='connector'; leave it out."
            )
        if self.connector == "train":
            raise ValueError(
                "connector='train' trains the connector whole, so site='connector' would add nothing to it; choose "
                "one of the two."
            )
