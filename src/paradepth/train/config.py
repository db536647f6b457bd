"""Options of a training run, in groups, with names unique across groups: they are the command line's flags."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from paradepth.train.budget import Budget


@dataclass(frozen=True)
class ModelOptions:
    """Model: a registered shape, and what to change of it (None keeps the shape's own value).

    Attributes:
        model: name from `paradepth list models`.
        branches: number of branches.
        depth: layers of each branch, or of a serial stack.
        depths: layers of each branch where they differ, instead of depth.
        width: D. heads: attention heads. mlp: hidden width of the feed-forward part.
        head_width: width of an attention head, where it is not width / heads: of a model whose heads were pruned.
        patch_size: patch height and width in pixels.
        embedding: of a patch, by one linear map or by convolutions (they learn small images in fewer passes).
        aggregate: how branches are added up.
        pool: mean over tokens, the first one (of images a class token) or, for texts, the last.
        dropout: probability in embedding, attention output and MLP.
        attention_dropout: probability for attention weights.
        bias: whether linear maps have biases.
        causal: classifiers of texts: a token sees itself and the ones before it only.
        deep_init: scale value, output and MLP projections by sqrt(log 2L).
        init_weights: how weights are drawn: default, truncated_normal or zero_output (every layer starts as the
            identity).
        context: tokens that a model of texts sees at most.
        step: h of every layer between the buffers; 1 is the ordinary Transformer.
        buffers: numbers of first and of last layers that take h = 1.
    """

    model: str = "paraformer_nano"
    branches: int | None = None
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    mlp: int | None = None
    head_width: int | None = None
    patch_size: int | None = None
    embedding: Literal["linear", "convolutions"] | None = None
    aggregate: Literal["residual", "sum"] | None = None
    pool: Literal["mean", "cls", "last"] | None = None
    dropout: float | None = None
    attention_dropout: float | None = None
    bias: bool | None = None
    causal: bool | None = None
    deep_init: bool = False
    init_weights: Literal["default", "truncated_normal", "zero_output"] = "default"
    context: int | None = None
    step: float | None = None
    buffers: tuple[int, int] | None = None
    depths: tuple[int, ...] | None = None


@dataclass(frozen=True)
class DataOptions:
    """Data and augmentation; options that mean nothing to the task are refused.

    Attributes:
        data: of images digits, mnist, fashion_mnist, cifar10, cifar100 or folder; of texts tiny_shakespeare or text; of
            labelled texts sst2, cola, mrpc, rte, qnli, mnli, qqp or labelled; of tagged sentences ud_english_ewt or
            conllu; of pairs of sentences multi30k or pairs.
        data_dir: where the data lies: a folder with local files in the Hub's layout, a folder of images, a file or a
            folder of texts; None fetches what the Hub has (digits needs neither).
        image_size: images: resize to this height and width.
        channels: images: 3 repeats the grey value of grey images, 1 makes colours grey.
        validation_fraction: part of the training split, or of a text, held out where the data has no validation split.
        train_fraction: part of the training split that is used, of every class alike; of a text one stretch. Drawn by
            the seed; epochs count the part.
        tokenizer: texts: bytes, bpe (trained on the training data), a tokenizer.json or a folder that has one, or
            hub:NAME, such as hub:gpt2.
        vocab_size: texts: size of a vocabulary that is made from the training data.
        masking: masked language models: part of the tokens that are to be guessed.
        columns: labelled texts of your own: names of the text column, or of both, and of the label column.
        languages: pairs: source and target language.
        tags: tagged sentences: what is predicted for a word: its part of speech, its morphological features, or both.
        pack: tagged sentences: put sentences that follow each other into one sample, up to the model's context.
        word_dropout: tagged sentences: part of the training words that are treated as words not in the vocabulary.
        class_names: images, labelled texts: the model's classes in its order, where it has others besides those of the
            data, or another order; the classes of the data are found among them by name.
        flip: random horizontal flips.
        crop_padding: random crops after padding by that many pixels.
        rand_augment: RandAugment's number of operations and magnitude.
    """

    data: str = "digits"
    data_dir: Path | None = None
    image_size: int | None = None
    channels: int | None = None
    validation_fraction: float = 0.1
    train_fraction: float = 1.0
    flip: bool = False
    crop_padding: int = 0
    rand_augment: tuple[int, int] | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    masking: float | None = None
    columns: tuple[str, ...] | None = None
    languages: tuple[str, str] | None = None
    tags: Literal["upos", "features", "both"] | None = None
    pack: bool = False
    word_dropout: float | None = None
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ScheduleOptions:
    """Order in which branches learn; options that a schedule does not take are refused.

    Attributes:
        schedule: joint, cycle, one_pass or stagewise.
        second_pass: cycle: follow each sweep by a pass with the full sum.
        prefix_losses: stagewise: train on the losses of all active prefixes.
        prefix_weights: one_pass, stagewise: weight of each prefix's loss.
        detach: one_pass, stagewise: earlier prefixes are constants for later ones (boosting).
        advance_on: stagewise: end a stage at a fixed point of the budget, or on a plateau of the validation loss.
        advance_at: stagewise: the fixed points, as parts of the budget.
        patience: stagewise: validations without improvement that make a plateau.
        min_delta: stagewise: improvement that counts.
        predecessors: stagewise: what the earlier branches do.
        slow_factor: stagewise: rate of slowed predecessors.
        new_branch: stagewise: start of a new branch.
        anneal: stagewise: warm-up and decay for each stage, or over the run.
    """

    schedule: Literal["joint", "cycle", "one_pass", "stagewise"] = "joint"
    second_pass: bool = True
    prefix_losses: bool = False
    prefix_weights: tuple[float, ...] | None = None
    detach: bool = False
    advance_on: Literal["fixed", "plateau"] | None = None
    advance_at: tuple[float, ...] | None = None
    patience: int | None = None
    min_delta: float | None = None
    predecessors: Literal["free", "slow", "frozen"] | None = None
    slow_factor: float | None = None
    new_branch: Literal["zero", "random"] | None = None
    anneal: Literal["stage", "run"] | None = None


@dataclass(frozen=True)
class OptimiserOptions:
    """Optimisation.

    Attributes:
        budget: how long: '20 epochs', '3000 steps' or '1.5e6 layer_evals' (one layer on one sample, forward and
            backward).
        batch_size: samples of one update, over all processes.
        accumulate: parts into which a process cuts its share of a batch to save memory.
        optimiser: adamw; muon for matrices with adamw for the rest; or sgd.
        learning_rate: peak rate.
        betas: decay of AdamW's averages of the gradient and of its square.
        momentum: of sgd; 0.9 where it is not given.
        weight_decay: decoupled, but sgd adds it to the gradient; on matrices only.
        warmup: part of the span spent warming up.
        decay: cosine to zero, constant after the warm-up, or falling as 1/√step after it.
        clip: largest gradient norm; 0 does not clip.
        label_smoothing: of the cross-entropy.
        ema: decay of an exponential moving average of the weights, which is then what is evaluated and saved; 0 is off.
        stem_rate, trunk_rate, head_rate: factors on the learning rate of these parts.
        freeze: parts that do not learn: stem, trunk, branch1, branch2 …, head; head:N is a classifier's head except for
            the classes behind its first N.
        slow: parts, of the same names, that learn slowly.
        slow_rate: factor on the learning rate of these.
    """

    budget: str = "20 epochs"
    batch_size: int = 128
    accumulate: int = 1
    optimiser: Literal["adamw", "muon", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float | None = None
    weight_decay: float = 0.05
    warmup: float = 0.05
    decay: Literal["cosine", "constant", "inverse_sqrt"] = "cosine"
    clip: float = 1.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    stem_rate: float = 1.0
    trunk_rate: float = 1.0
    head_rate: float = 1.0
    freeze: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()
    slow_rate: float = 0.1

    def part_rates(self) -> dict[str, float]:
        """Factors on the learning rate of "stem", "trunk" and "head"."""
        return {"stem": self.stem_rate, "trunk": self.trunk_rate, "head": self.head_rate}


@dataclass(frozen=True)
class DepthOptions:
    """How the layers of a serial stack are evaluated in training; options that an executor does not take are refused,
    None is the executor's own default. Validation is serial.

    Attributes:
        executor: serial; mgrit, multigrid over the layers; picard, sweeps over all layers at once.
        checkpoint_layers: serial: store states between layers only and evaluate layers again in the backward pass.
        levels: mgrit: number of levels.
        coarsening: mgrit: layers of an interval.
        relaxation: mgrit: F or FCF.
        coarse: mgrit: coarse operator: sample, branch, half or branch:k.
        cycle: mgrit: V or F.
        forward_iterations: mgrit, picard: iterations of the forward solve, or serial.
        backward_iterations: mgrit, picard: iterations of the backward solve, or serial.
        initial: mgrit, picard: first guess.
        tolerance: mgrit, picard: relative residual at which iterating stops.
        recompute: mgrit, picard: evaluate layers again in the backward pass (True) or keep their graphs.
        batched: mgrit, picard: evaluate layers that are alike at once, for GPUs and small batches.
        chunk: picard: layers that are swept together.
        control: probe the convergence and change iterations, or between parallel and serial.
        probe_every: control: batches between probes.
        rho_threshold: control: convergence factor from which a probe is bad.
        rho_return: control: convergence factor up to which a probe is good.
        probe_patience: control: probes in a row that have to agree.
        max_iterations: control: most iterations before going serial.
        exact_probe: control: at a probe, also compare the gradient with the serial one.
        depth_processes: processes that share the layers; None: all for mgrit and picard, one for serial.
        lipschitz: log an estimate of each layer's Lipschitz constant at each validation.
    """

    executor: Literal["serial", "mgrit", "picard"] = "serial"
    checkpoint_layers: bool = False
    levels: int | None = None
    coarsening: int | None = None
    relaxation: Literal["F", "FCF"] | None = None
    coarse: str | None = None
    cycle: Literal["V", "F"] | None = None
    forward_iterations: int | Literal["serial"] | None = None
    backward_iterations: int | Literal["serial"] | None = None
    initial: Literal["coarse", "previous", "constant"] | None = None
    tolerance: float | None = None
    recompute: bool | None = None
    batched: bool | None = None
    chunk: int | None = None
    control: bool = False
    probe_every: int | None = None
    rho_threshold: float | None = None
    rho_return: float | None = None
    probe_patience: int | None = None
    max_iterations: int | None = None
    exact_probe: bool = False
    depth_processes: int | None = None
    lipschitz: bool = False


@dataclass(frozen=True)
class BranchOptions:
    """How branches are evaluated in training.

    Attributes:
        branch_executor: loop, one branch after another; batched, those that are alike as batched tensors; threads, on
            worker threads (CPUs); auto, whichever is measured to be the fastest (one process).
        branch_processes: processes that share the branches, each evaluating its own; a divisor of their number, the
            rest being data parallel. None: every process has all branches.
    """

    branch_executor: Literal["loop", "batched", "threads", "auto"] = "loop"
    branch_processes: int | None = None


@dataclass(frozen=True)
class RunOptions:
    """Running.

    Attributes:
        seed: of initialisation, order of samples, augmentation, dropout and the validation split.
        init: a run directory or a saved model whose stem and trunk the new model starts with; its head is new unless it
            fits.
        precision: bf16 autocast, float32, or auto: bf16 where the hardware has it.
        device: auto, cpu or cuda.
        threads: CPU threads of each process; None leaves torch's choice.
        compile: compile the training step.
        validations: number of validations over the run, evenly spaced over the budget.
        checkpoint_every: steps between checkpoints; None writes one at each validation.
        keep: number of checkpoints kept.
        tensorboard: also write TensorBoard event files into the run directory.
        timeout: seconds after which a process that does not answer counts as lost.
    """

    seed: int = 0
    init: Path | None = None
    precision: Literal["auto", "bf16", "float32"] = "auto"
    device: str = "auto"
    threads: int | None = None
    compile: bool = False
    validations: int = 20
    checkpoint_every: int | None = None
    keep: int = 3
    tensorboard: bool = False
    timeout: float = 600.0


@dataclass(frozen=True)
class Config:
    """All options of a run; a recipe returns one."""

    recipe: str = "custom"
    model_options: ModelOptions = field(default_factory=ModelOptions)
    data_options: DataOptions = field(default_factory=DataOptions)
    schedule_options: ScheduleOptions = field(default_factory=ScheduleOptions)
    depth_options: DepthOptions = field(default_factory=DepthOptions)
    branch_options: BranchOptions = field(default_factory=BranchOptions)
    optimiser_options: OptimiserOptions = field(default_factory=OptimiserOptions)
    run_options: RunOptions = field(default_factory=RunOptions)

    def changed(self, other: Config) -> dict[str, Any]:
        """The options in which `other` differs from this, with its values.

        >>> Config().changed(Config().replace(seed=3, schedule="cycle"))
        {'schedule': 'cycle', 'seed': 3}
        """
        mine, theirs = (
            {f.name: getattr(group, f.name) for group in c.groups().values() for f in dataclasses.fields(group)}
            for c in (self, other)
        )
        return {name: value for name, value in theirs.items() if value != mine[name]}

    def flat(self) -> dict[str, Any]:
        """All options in one JSON-able dictionary."""
        flat: dict[str, Any] = {"recipe": self.recipe}
        for group in self.groups().values():
            flat |= dataclasses.asdict(group)
        return {key: str(value) if isinstance(value, Path) else value for key, value in flat.items()}

    def groups(self) -> dict[str, Any]:
        """The groups of options by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "recipe"}

    @classmethod
    def from_flat(cls, flat: dict[str, Any]) -> Config:
        """The inverse of `flat`.

        Raises:
            ValueError: unknown options.

        >>> Config.from_flat(Config().flat()) == Config()
        True
        """
        return cls().replace(**flat)

    def replace(self, **options: Any) -> Config:
        """A copy with some options, named without their groups, replaced.

        Another schedule or executor starts from its own defaults, since the options of the present one mean nothing to
        it.

        Raises:
            ValueError: unknown options.

        >>> Config().replace(seed=3, data="mnist").run_options.seed
        3
        """
        left = dict(options)
        recipe = left.pop("recipe", self.recipe)
        groups = {}
        for name, group in self.groups().items():
            own = {f.name for f in dataclasses.fields(group)} & set(left)
            values: dict[str, Any] = {key: left.pop(key) for key in own}
            values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            for place in ("data_dir", "init"):
                if values.get(place) is not None:
                    values[place] = Path(values[place])
            for choice in ("schedule", "executor"):
                if choice in values and values[choice] != getattr(group, choice):
                    group = type(group)()
            groups[name] = dataclasses.replace(group, **values)
        if left:
            raise ValueError(f"unknown options {', '.join(sorted(left))}")
        return Config(recipe=recipe, **groups)


def check_options(config: Config) -> None:
    """Refuses numbers out of range, before any work starts.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    o, r, d = config.optimiser_options, config.run_options, config.data_options
    Budget.parse(o.budget)
    for name, value, ok, allowed in (
        ("batch_size", o.batch_size, o.batch_size >= 1, "at least 1"),
        ("accumulate", o.accumulate, o.accumulate >= 1, "at least 1"),
        ("learning_rate", o.learning_rate, 0 < o.learning_rate < float("inf"), "positive"),
        ("betas", o.betas, len(o.betas) == 2 and all(0 <= b < 1 for b in o.betas), "two numbers, at least 0, below 1"),
        ("weight_decay", o.weight_decay, 0 <= o.weight_decay < float("inf"), "at least 0"),
        ("clip", o.clip, o.clip >= 0, "at least 0 (0 does not clip)"),
        ("label_smoothing", o.label_smoothing, 0 <= o.label_smoothing < 1, "at least 0 and below 1"),
        ("ema", o.ema, 0 <= o.ema < 1, "at least 0 and below 1"),
        *((f"{p}_rate", r, 0 <= r < float("inf"), "at least 0") for p, r in o.part_rates().items()),
        ("decay", o.decay, o.decay in ("cosine", "constant", "inverse_sqrt"), "cosine, constant or inverse_sqrt"),
        ("slow_rate", o.slow_rate, 0 < o.slow_rate < 1, "above 0 and below 1"),
        ("validations", r.validations, r.validations >= 1, "at least 1"),
        ("keep", r.keep, r.keep >= 1, "at least 1"),
        ("timeout", r.timeout, r.timeout > 0, "positive"),
        ("threads", r.threads, r.threads is None or r.threads >= 1, "at least 1"),
        ("checkpoint_every", r.checkpoint_every, r.checkpoint_every is None or r.checkpoint_every >= 1, "at least 1"),
        ("crop_padding", d.crop_padding, d.crop_padding >= 0, "at least 0"),
        ("train_fraction", d.train_fraction, 0 < d.train_fraction <= 1, "above 0 and at most 1"),
        ("seed", r.seed, 0 <= r.seed < 2**31, "between 0 and 2147483647"),
        ("optimiser", o.optimiser, o.optimiser in ("adamw", "muon", "sgd"), "'adamw', 'muon' or 'sgd'"),
        ("momentum", o.momentum, o.momentum is None or 0 <= o.momentum < 1, "at least 0 and below 1"),
        ("precision", r.precision, r.precision in ("auto", "bf16", "float32"), "'auto', 'bf16' or 'float32'"),
    ):
        if not ok:
            raise ValueError(f"{name} is {value!r}; it must be {allowed}")
    if o.momentum is not None and o.optimiser != "sgd":
        raise ValueError(f"momentum is {o.momentum}; it means nothing to optimiser {o.optimiser!r}, only to 'sgd'")
    if o.slow_rate != OptimiserOptions.slow_rate and not o.slow:
        raise ValueError(f"slow_rate is {o.slow_rate}, and no part is slow; name some with slow")
    if o.optimiser == "sgd" and tuple(o.betas) != OptimiserOptions.betas:
        raise ValueError(f"betas are {o.betas}; they mean nothing to optimiser 'sgd', which has a momentum")
