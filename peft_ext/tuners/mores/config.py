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
    Configuration of [`MoReSModel`]. MoReS steers the hidden states of a few tokens in a subspace of rank `r`:
    `h' = h + R(W h + b − Rᵀh)` with `RᵀR = I`. The model itself stays frozen.

    Paper: Bi et al., [LLaVA Steering: Visual Instruction Tuning with 500x Fewer Parameters through Modality Linear
    Representation-Steering](https://arxiv.org/abs/2412.12359), equations 3 and 4. The defaults are the paper's: rank
    1, and one percent of the visual tokens, the first and the last ones. Two defaults differ from the published code:
    steering starts as the identity, and the last layer is left out.

    Args:
        rank (`int`, *optional*, defaults to 1):
            Dimension `r` of the subspace. Each steered layer has `2·D·r + r` trained numbers, with hidden size `D`.
        token_ratio (`float`, *optional*, defaults to 0.01):
            Share of each image's tokens that is steered, in (0, 1]. At least one token is.
        token_selection (`str`, *optional*, defaults to `"ends"`):
            Which tokens are steered: `"ends"` (the first and the last, as in the published recipe), `"first"`,
            `"last"`, `"uniform"` (evenly spread), `"random"` (drawn once, by `seed`) or `"all"`.
        token_grouping (`str`, *optional*, defaults to `"image"`):
            What `token_ratio` is a share of. `"image"`: each run of neighbouring visual tokens, which is an image or
            one of its tiles. `"sample"`: all visual tokens of a sample.
        token_positions (`str`, *optional*):
            Steer tokens of the prompt instead of visual tokens. `"f7+l7"` means the first seven and the last seven.
            With `rank=8` and `layers_to_transform="all"` this is LoReFT (Wu et al., [ReFT: Representation Finetuning
            for Language Models](https://arxiv.org/abs/2404.03592)) with one module per layer. In `generate()` the
            prompt is what you pass. In training it is what precedes the first label. In any other call it is the whole
            input. Use [`unfinished_prompt`] to fill a cache with a part of a prompt. `token_ratio` and
            `token_selection` are not used.
        layers_to_transform (`list[int]`, `int` or `str`, *optional*):
            Decoder layers whose output is steered, or `"all"`. Layers count from 0, negative numbers from the end. By
            default all but the last for visual tokens, because nothing reads visual tokens after the last layer; all
            layers with `token_positions`.
        site (`str`, *optional*, defaults to `"layers"`):
            Where to steer. `"layers"`: after decoder layers. `"connector"`: the output of the connector, which needs
            `token_ratio=1.0`. It is then a linear map, which can be merged.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the update, in training only.
        tie_projections (`bool`, *optional*, defaults to `True`):
            Whether one matrix `R` projects down and up, as in the published code. `False` trains a second orthonormal
            matrix that projects down (`3·D·r` numbers).
        init (`str`, *optional*, defaults to `"identity"`):
            `"identity"` changes nothing at first. `"random"` draws `W` and `b` as `nn.Linear` does. The published code
            does so; it disturbs each steered token at first.
        steering_bias (`bool`, *optional*, defaults to `True`):
            Whether there is a `b`.
        connector (`str`, *optional*, defaults to `"frozen"`):
            `"train"` also trains the whole connector, as the published recipe does, and saves it with the adapter.
        seed (`int`, *optional*, defaults to 0):
            Seed of `token_selection="random"`.
        target_modules (`list[str]`, *optional*):
            Names of the steered modules. Filled in.
        modules_to_save (`list[str]`, *optional*):
            Further modules that are trained and saved whole.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Tokens whose embeddings are trained too, as in PEFT.
        peft_ext_version (`str`, *optional*):
            Version of peft_ext that wrote the adapter. Filled in when a config is saved.
        requires (`str`, *optional*):
            Package needed to load the adapter. Filled in.

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
