"""The options of a training run, in groups. Names are unique across groups: they are the command line's flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


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
        aggregate: how branches are added up: residual, x + Σ δ; sum, Σ (x + δ); gated, x + Σ α(x) δ.
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
        mixing: what mixes the tokens: attention, or static, matrices that do not depend on the input.
        static_layers: static: the layers that it is of, counted from 0 through one branch after the other; None: all.
        mixing_rank: static: rank of factorised matrices; None has full ones.
        share: layers that share their weights: none; branches, those at the same place of each branch; depth, those of
            a branch or of a serial stack; attention or mlp, these parts of all layers.
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
    aggregate: Literal["residual", "sum", "gated"] | None = None
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
    mixing: Literal["attention", "static"] | None = None
    static_layers: tuple[int, ...] | None = None
    mixing_rank: int | None = None
    share: Literal["none", "branches", "depth", "attention", "mlp"] | None = None


@dataclass(frozen=True)
class DataOptions:
    """Data and augmentation; options that mean nothing to the task are refused.

    Attributes:
        data: of images digits, mnist, fashion_mnist, cifar10, cifar100 or folder; of texts tiny_shakespeare or text; of
            sequences made by a rule recall, copying, copying_fixed or sorting; of labelled texts sst2, cola, mrpc, rte,
            qnli, mnli, qqp or labelled; of tagged sentences ud_english_ewt or conllu; of pairs of sentences multi30k or
            pairs.
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
        length: sequences made by a rule: number of pairs of recall, of symbols of the others.
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
    length: int | None = None


@dataclass(frozen=True)
class ScheduleOptions:
    """Order in which branches learn; options that a schedule does not take are refused.

    Attributes:
        schedule: joint, cycle, one_pass, stagewise or one that was registered.
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

    schedule: Literal["joint", "cycle", "one_pass", "stagewise"] | str = "joint"
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
        gate_penalty: aggregate gated: the mean of the gates times this is added to the loss, so that branches that are
            of little use to a sample end up with gates near 0.
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
    gate_penalty: float = 0.0
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
        executor: serial; mgrit, multigrid over the layers; picard, sweeps over all layers at once; or one that was
            registered.
        checkpoint_layers: serial: store states between layers only and evaluate layers again in the backward pass.
        levels: mgrit: number of levels.
        coarsening: mgrit: layers of an interval.
        relaxation: mgrit: F or FCF.
        coarse: mgrit: coarse operator: sample, branch, half, branch:k or one that was registered.
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

    executor: Literal["serial", "mgrit", "picard"] | str = "serial"
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
            worker threads (CPUs); auto, whichever is measured to be the fastest (one process); or one that was
            registered.
        branch_processes: processes that share the branches, each evaluating its own; a divisor of their number, the
            rest being data parallel. None: every process has all branches.
    """

    branch_executor: Literal["loop", "batched", "threads", "auto"] | str = "loop"
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
