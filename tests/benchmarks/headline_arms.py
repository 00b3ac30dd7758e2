"""The arms of the headline benchmark, at the size of two CPU cores and at that of one GPU."""

from __future__ import annotations

from dataclasses import replace

from lightning_hybrid.models import ExpertsConfig, LatentConfig, PredictionConfig, TransformerConfig
from tests.benchmarks.headline_run import Arm, Budget

ADAMW_RATES, MUON_RATES = (2e-3, 4e-3, 8e-3), (1e-2, 2e-2, 4e-2)
"""What every arm's learning rate is searched among: three, a factor of two apart. Muon's are larger because its updates
are scaled to the size of AdamW's and act on matrices only."""


def cpu() -> tuple[Budget, list[Arm]]:
    """N = 114K against 314K weights outside embedding and head; two processes with a core each."""
    budget = Budget(context=128, batch_tokens=4096, steps=360, evaluations=20, validation_windows=128)

    def dense(width: int, heads: int, hidden: int) -> TransformerConfig:
        return TransformerConfig(width=width, blocks=3, heads=heads, feed_forward=hidden, context_length=budget.context)

    small, large = dense(56, 2, 152), dense(96, 4, 236)
    mixture = ExpertsConfig(experts=16, chosen=2, hidden=48, shared=1, dense_blocks=1, balance_loss=0.0)
    experts = replace(small, experts=mixture)
    latent = LatentConfig(key_value=28, rotary=8, head=20, value=28)
    return budget, _arms(small, large, experts, latent, "2", sharded="fsdp2")


def gpu() -> tuple[Budget, list[Arm]]:
    """N = 1.55M against 4.26M; one device, so that nothing is sharded."""
    budget = Budget(
        context=512,
        batch_tokens=32_768,
        steps=6_100,
        evaluations=20,
        validation_windows=512,
        packages=True,
        device="cuda",
    )

    def dense(width: int, heads: int, hidden: int) -> TransformerConfig:
        return TransformerConfig(width=width, blocks=5, heads=heads, feed_forward=hidden, context_length=budget.context)

    small, large = dense(160, 5, 432), dense(256, 8, 768)
    experts = replace(small, experts=ExpertsConfig(experts=16, chosen=3, hidden=104, shared=1, dense_blocks=1))
    latent = LatentConfig(key_value=64, rotary=16, head=32, value=32)
    return budget, _arms(small, large, experts, latent, "1", sharded="dp1")


def _arms(
    small: TransformerConfig,
    large: TransformerConfig,
    experts: TransformerConfig,
    latent: LatentConfig,
    devices: str,
    sharded: str,
) -> list[Arm]:
    whole = f"dp{devices}"
    traditional = Arm(
        name="traditional",
        about="dense, 2.75 N; AdamW, fixed batch, float32 states, replicated (DDPStrategy)",
        transformer=large,
        layout=f"ddp{devices}",
        learning_rates=ADAMW_RATES,
    )
    scheme = Arm(
        name="scheme",
        about="mixture of experts, N active; Muon, moments in bfloat16, batch schedule",
        transformer=experts,
        layout=whole,
        optimizer="muon",
        moments="bfloat16",
        learning_rates=MUON_RATES,
        microbatch_share=0.375,
        ramp=0.8,
    )
    quick = replace(scheme, name="scheme, fewer tokens", about="the same, half of the tokens", token_share=0.5)
    prediction = replace(experts, prediction=PredictionConfig())
    return [
        traditional,
        scheme,
        quick,
        _like(quick, "− experts", "dense, N", transformer=small),
        _like(quick, "− Muon", "AdamW", optimizer="adamw", learning_rates=ADAMW_RATES),
        _like(quick, "− batch schedule", "batch size of the traditional arm", ramp=0.0, microbatch_share=0.5),
        _like(
            quick, "+ latent attention", "keys and values from a latent", transformer=replace(experts, latent=latent)
        ),
        _like(quick, "+ multi-token prediction", "one further token", transformer=prediction),
        _like(quick, "+ expert parallelism", "experts divided over the ranks", layout=f"ep{devices}"),
        _like(traditional, "control: N dense", "as traditional, N", transformer=small),
        _like(traditional, "control: N dense, ParScale", "4 streams for the last 2 %", transformer=small, streams=4),
        _like(traditional, "control: 2.75 N sharded", "as traditional, sharded by `fsdp`", layout=sharded),
        _like(
            traditional,
            "control: 2.75 N, small batch, Muon",
            "gain without the architecture",
            optimizer="muon",
            learning_rates=MUON_RATES,
            microbatch_share=0.375,
            ramp=0.8,
            token_share=0.5,
        ),
    ]


def _like(arm: Arm, name: str, about: str, **changes: object) -> Arm:
    return replace(arm, name=name, about=about, **changes)  # type: ignore[arg-type]
