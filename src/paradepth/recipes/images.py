"""Image classification."""

from __future__ import annotations

from paradepth.train import Config


def digits_paraformer() -> Config:
    """The demo: 8 × 8 digits that come with scikit-learn, 4 branches × 2 layers, stagewise.

    Expected: 98 % on the test split after about 2 minutes on two CPU cores; no network.
    """
    return Config().replace(
        model="paraformer_nano",
        patch_size=2,
        data="digits",
        crop_padding=1,
        schedule="stagewise",
        prefix_losses=True,
        budget="80 epochs",
        batch_size=64,
        learning_rate=3e-3,
        weight_decay=0.1,
        label_smoothing=0.05,
        ema=0.98,
        validations=24,
    )


def fashion_paraformer() -> Config:
    """Fashion-MNIST, 4 branches × 2 layers of width 64 on patches embedded by convolutions, stagewise.

    Expected: 91.4 % on the test split (91.0, 91.5, 91.5, 91.4 % by prefix; 92.2 % on validation) after 21 minutes of
    two CPU cores that multiply bf16. With `--budget "28 epochs"` 91.9 %, after about 27.
    """
    return Config().replace(
        model="paraformer_nano",
        patch_size=4,
        embedding="convolutions",
        data="fashion_mnist",
        flip=True,
        crop_padding=2,
        schedule="stagewise",
        prefix_losses=True,
        budget="22 epochs",
        optimiser="muon",
        learning_rate=2e-3,
        label_smoothing=0.1,
        ema=0.998,
        validations=16,
    )


def fashion_vit() -> Config:
    """Fashion-MNIST, the serial counterpart of `fashion_paraformer`: 8 layers of width 64.

    About 40 minutes on two CPU cores that multiply bf16; accuracy is not measured at this budget. At equal compute and
    short budgets it is 1 to 4 % less accurate than the ParaFormer (`studies/schedules`).
    """
    return fashion_paraformer().replace(model="vit_nano", depth=8, schedule="joint")


def cifar10_paraformer() -> Config:
    """CIFAR-10, 4 branches × 2 layers of width 192.

    For a GPU: 6·10^15 FLOP, some 30 minutes there and about 14 hours on two CPU cores. Accuracy is not measured yet;
    ViTs of this size trained from scratch are reported at about 90 %.
    """
    return Config().replace(
        model="paraformer_tiny",
        patch_size=4,
        data="cifar10",
        flip=True,
        crop_padding=4,
        rand_augment=(2, 14),
        schedule="stagewise",
        budget="100 epochs",
        label_smoothing=0.1,
    )


def cifar10_vit() -> Config:
    """CIFAR-10, the serial counterpart of `cifar10_paraformer`: 8 layers of width 192.

    For a GPU: 7·10^15 FLOP, some 30 minutes there. Accuracy is not measured yet; about 90 % is reported for this size.
    """
    return cifar10_paraformer().replace(model="vit_tiny", depth=8, schedule="joint")


def cifar100_paraformer() -> Config:
    """CIFAR-100, 4 branches × 2 layers of width 192.

    For a GPU: 6·10^15 FLOP, some 30 minutes there. Accuracy is not measured yet; about 65 % is reported for this size.
    """
    return cifar10_paraformer().replace(data="cifar100")


def cifar100_vit() -> Config:
    """CIFAR-100, the serial counterpart of `cifar100_paraformer`: 8 layers of width 192.

    For a GPU: 7·10^15 FLOP; neither the time (some 30 minutes there, by the FLOP) nor the accuracy is measured; about
    65 % is reported for this size. With `paradepth finetune RUN --task cifar10 --train-fraction 0.01` the full-size
    form of the study `transfer`.
    """
    return cifar10_vit().replace(data="cifar100")


def paraformer_authors_224() -> Config:
    """The authors' published setting, for a GPU: CIFAR-10 at 224 pixels, 8 branches × 2 layers, cycle, no decay.

    8·10^17 FLOP: several hours on a data-centre GPU. The paper claims up to 2.39 % more than a ViT; not measured.
    """
    return Config().replace(
        model="paraformer_tiny_8x2_224",
        data="cifar10",
        image_size=224,
        flip=True,
        crop_padding=4,
        rand_augment=(2, 14),
        schedule="cycle",
        budget="300 epochs",
        batch_size=500,
        learning_rate=1e-4,
        weight_decay=0.0,
        warmup=0.0,
        decay="constant",
        clip=1.0,
    )
