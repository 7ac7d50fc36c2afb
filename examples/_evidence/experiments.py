"""Which experiments there are, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .protocol import Comparison
from .stand_ins import PREFIX


DOMAINS = ("movies", "editorials", "tweets", "products")
SEARCHED = ("movies", "tweets")  # domains that learning rates are chosen on
STEPS = {200: 50, 1000: 80}  # per number of training sentences
CRITERIA = ("magnitude", "gradient", "activation", "random", "reverse")


def _selections() -> tuple[str, ...]:
    """Every criterion per neuron, layer and network; NeuroAda's own first."""
    names = [f"{criterion}{scope}" for scope in ("", "_layer", "_network") for criterion in CRITERIA]
    return tuple("neuroada-k1" if name == "magnitude" else f"neuroada-k1+selection={name}" for name in names)


NEUROADA = Comparison(
    name="neuroada-200",
    title="NeuroAda beside other methods, 200 sentences (thesis tables 5.1-5.3, figures 5.4 and 5.5)",
    model="minilm",
    methods=(
        "neuroada-k1",
        "neuroada-k4",
        "neuroada-k20",
        "lora-r1",
        "lora-r8",
        "shira-k4",
        "supertuning-k4",
        "masked-k4",
        "bitfit",
        "ia3",
        "probe",
        "full",
    ),
    data=DOMAINS,
    search_data=SEARCHED,
    steps={200: STEPS[200]},
    chosen_by="accuracy",
)
GPS_IMAGES = Comparison(
    name="gps-images",
    title="GPS on a ViT of DINOv2 (thesis tables 4.2-4.6)",
    model="dinov2",
    methods=(
        "gps-k1",
        "gps-k4",
        "gps-k1+scores=cross_entropy",
        "gps-k1+selection=activation",
        "gps-k1+selection=gradient_layer",
        "gps-k1+selection=gradient_network",
        "gps-k1+selection=magnitude",
        "gps-k1+selection=random",
        "gps-k1+selection=random_network",
        "neuroada-k1",
        "lora-r8",
        "bitfit",
        "probe",
        "full",
    ),
    data=("mnist",),
    search_data=("mnist",),
    steps={400: 50},
    validation=200,
    test=600,
    image_size=56,
)
COMPARISONS = (
    NEUROADA,
    replace(
        NEUROADA,
        name="neuroada-by-loss",
        title="The same and four more, with the learning rates of the lowest loss on validation samples",
        methods=(
            *NEUROADA.methods,
            "neuroada-k1+train_bias=true",
            "neuroada-k1+selection=gradient",
            "neuroada-k1+selection=random",
            "neuroada-k4+column_budget=8",
        ),
        chosen_by="loss",
    ),
    Comparison(
        name="selection",
        title="Which entries, and how many (thesis figures 5.6 and 5.7)",
        model="minilm",
        methods=(
            *_selections(),
            "neuroada-k1+neuron_ratio=0.25",
            "neuroada-k1+neuron_ratio=0.5",
            "neuroada-k2",
            "neuroada-k4",
            "neuroada-k20",
            "neuroada-k50",
            "neuroada-k4+column_budget=8",
            "neuroada-k4+column_budget=32",
            "neuroada-k1+train_bias=true",
        ),
        data=("movies",),
        search_data=("movies",),
        steps={200: STEPS[200]},
    ),
    Comparison(
        name="gps-text",
        title="GPS on a language model (thesis tables 4.2-4.6)",
        model="minilm",
        methods=(
            "gps-k1",
            "gps-k4",
            "gps-k1+scores=cross_entropy",
            "gps-k1+selection=activation",
            "gps-k1+selection=gradient_network",
            "gps-k1+selection=random",
            "gps-k1+train_bias=false",
            "neuroada-k1",
            "lora-r8",
            "bitfit",
            "probe",
            "full",
        ),
        data=SEARCHED,
        search_data=SEARCHED,
        steps={200: STEPS[200]},
    ),
    GPS_IMAGES,
    replace(
        GPS_IMAGES,
        name="gps-images-lower",
        title="The same at the next lower learning rate: does training become reliable?",
        methods=(
            "gps-k1",
            "gps-k4",
            "gps-k1+selection=magnitude",
            "gps-k1+selection=random",
            "neuroada-k1",
            "lora-r8",
            "bitfit",
        ),
        lower=1,
    ),
    replace(
        GPS_IMAGES,
        name="gps-convolutions",
        title="GPS on EfficientNet-Lite0 (thesis tables 4.4 and 4.6)",
        model="efficientnet",
        methods=("gps-k1", "gps-k4", "gps-k1+selection=random", "lora-r8", "bitfit", "probe", "full"),
        image_size=96,
    ),
    Comparison(
        name="decoder",
        title="A decoder: SmolLM2-135M, its last token classifies",
        model="smollm2",
        methods=("neuroada-k1", "lora-r8", "probe"),
        data=("movies",),
        search_data=("movies",),
        steps={200: 40},
        batch_size=8,
        validation=150,
        test=300,
    ),
    replace(
        NEUROADA,
        name="neuroada-1000",
        title="NeuroAda beside other methods, 1,000 sentences",
        methods=(
            "neuroada-k1",
            "neuroada-k4",
            "neuroada-k20",
            "lora-r8",
            "shira-k4",
            "bitfit",
            "probe",
            "full",
        ),
        steps={1000: STEPS[1000]},
        chosen_by="loss",
    ),
)


@dataclass(frozen=True)
class TasksSize:
    """Sizes of the multi-task experiment: rows have a sentence of every domain."""

    model: str = "minilm"
    rows: int = 240
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    widenings: int = 3
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    methods: tuple[str, ...] = ("joint", "pcgrad", "cagrad", "mgda", "imtl_g", "nash_mtl", "famo")


@dataclass(frozen=True)
class MergingSize:
    """Sizes of the merging experiment; its learning rates are those of `neuroada-by-loss`."""

    methods: tuple[str, ...] = ("neuroada-k1", "neuroada-k4", "lora-r8")
    data: tuple[str, ...] = DOMAINS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    validation: int = 100
    test: int = 400


@dataclass(frozen=True)
class UnmergingSize:
    """Sizes of the unmerging experiment; learning rates as in [`MergingSize`]."""

    methods: tuple[str, ...] = ("neuroada-k1", "shira-k4", "neuroada-k4", "lora-r8")
    cycles: tuple[int, ...] = (1, 10, 100, 1000)


@dataclass(frozen=True)
class Plan:
    """All experiments."""

    comparisons: tuple[Comparison, ...] = COMPARISONS
    tasks: TasksSize = TasksSize()
    merging: MergingSize = MergingSize()
    unmerging: UnmergingSize = UnmergingSize()

    @property
    def names(self) -> list[str]:
        return [*(comparison.name for comparison in self.comparisons), "tasks", "merging", "unmerging", "cost"]

    def comparison(self, name: str) -> Comparison:
        return next(comparison for comparison in self.comparisons if comparison.name == name)


def quick(plan: Plan) -> Plan:
    """Does it run, not how well: two methods, few steps and samples, two seeds."""
    comparisons = tuple(
        replace(
            comparison,
            methods=tuple(dict.fromkeys(comparison.methods[:1] + comparison.methods[-1:])),
            data=comparison.data[:1],
            search_data=comparison.search_data[:1],
            steps={32: 2},
            batch_size=4,
            seeds=(0, 1),
            trials=3,
            widenings=1,
            validation=10,
            test=16,
        )
        for comparison in plan.comparisons
    )
    return Plan(
        comparisons,
        replace(plan.tasks, rows=16, seeds=(0, 1), methods=("joint",), rates=(1e-3,), widenings=0),
        replace(
            plan.merging, methods=plan.merging.methods[-2:], data=DOMAINS[:2], seeds=(0, 1), validation=10, test=16
        ),
        replace(plan.unmerging, methods=plan.unmerging.methods[-2:], cycles=(1, 3)),
    )


def with_stand_ins(plan: Plan) -> Plan:
    """The same on tiny random models and made-up data: needs no download."""
    comparisons = tuple(
        replace(
            comparison,
            model=f"{PREFIX}{comparison.model}",
            data=tuple(f"{PREFIX}{name}" for name in comparison.data),
            search_data=tuple(f"{PREFIX}{name}" for name in comparison.search_data),
            image_size=28 if comparison.image_size else None,
        )
        for comparison in plan.comparisons
    )
    tasks = replace(plan.tasks, model=f"{PREFIX}{plan.tasks.model}")
    merging = replace(plan.merging, data=tuple(f"{PREFIX}{name}" for name in plan.merging.data))
    return replace(plan, comparisons=comparisons, tasks=tasks, merging=merging)
