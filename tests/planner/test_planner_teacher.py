"""The planner of a teacher server: FLOPs against torch's counter, bytes against real answers, tables against sums by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from m2mkd_ds.config import RunConfig, apply_overrides
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.data.sources.registry import make_source
from m2mkd_ds.distill.hybrid import FrozenMeta, freeze
from m2mkd_ds.distill.pairs import stage_spans, stitch_specs, teaching_pairs
from m2mkd_ds.models.vit import VitArch, build_stage
from m2mkd_ds.models.vmoe import VisionMoE, arch_from_config
from m2mkd_ds.planner.teacher import Cluster, Gpu, TeacherPlan, Traffic, plan_teacher
from m2mkd_ds.planner.teacher_text import format_plan
from m2mkd_ds.recipes.fashion import fashion
from m2mkd_ds.recipes.imagenet import vmoe_base_in1k
from m2mkd_ds.teacher.produce import Producer, TeacherParts
from m2mkd_ds.teacher.wire import GetBatch

NEAR = 0.02
IMAGES = 2


def vit_large(decode: str = "fast") -> RunConfig:
    """ViT-L/16 at 224 pixels teaching V-MoE-B: 197 tokens of 1024."""
    config = vmoe_base_in1k()
    return replace(config, data=replace(config.data, decode=decode))


@cache
def planned(cluster: Cluster, decode: str = "fast") -> TeacherPlan:
    """Its plan, made once for all tests."""
    return plan_teacher(vit_large(decode), cluster)


def payload(plan: TeacherPlan, name: str, wire_dtype: str = "-") -> Traffic:
    return next(one for one in plan.traffic if (one.payload, one.wire_dtype) == (name, wire_dtype))


def test_flops_of_the_paper_are_those_worked_out_by_hand() -> None:
    """One ViT-L block: 24 L D^2 + 4 L^2 D = 4.958 + 0.159 = 5.117 G. One V-MoE-B block, top-2: 4.769 G. Patches of ViT-L: 0.308 G.

    Prefix and suffix are one block a stage, a module six; a module of the student is three blocks and a stitch of 0.310 G on each
    inner side; its forward and backward pass cost three forward passes.
    """
    plan = planned(Cluster())
    found = [
        (w.prefix, w.module, w.suffix, w.server, w.student, w.student_suffix, w.trainer, w.colocated)
        for w in (job.work for job in plan.pair_jobs)
    ]
    by_hand = [  # GFLOP
        (0.0, 31.0, 15.4, 46.4, 44.5, 15.4 + 15.8, 75.7, 122.1),
        (5.4, 30.7, 10.2, 46.4, 44.8, 10.2 + 10.6, 65.6, 111.9),
        (10.5, 30.7, 5.1, 46.4, 44.8, 5.1 + 5.3, 55.2, 101.5),
        (15.7, 30.7, 0.0, 46.4, 43.9, 0.0, 43.9, 90.2),
    ]
    for ours, theirs in zip(found, by_hand, strict=True):
        assert [value / 1e9 for value in ours] == pytest.approx(theirs, rel=NEAR, abs=1e-9)
    whole = plan.all_job.work
    assert (whole.server / 1e9, whole.student / 1e9, whole.student_suffix / 1e9) == pytest.approx((169.5, 178, 62.4), rel=NEAR)
    assert sum(job.work.server for job in plan.pair_jobs) / 1e9 == pytest.approx(185.4, rel=NEAR)  # with nothing shared
    assert plan.teacher_parameters == pytest.approx(355e6, rel=NEAR)
    assert plan.weight_bytes == pytest.approx(0.71e9, rel=NEAR)  # bf16


def test_gpus_and_rates_follow_from_flops_and_the_assumed_shares_of_the_peak() -> None:
    plan = planned(Cluster(gpu=Gpu(tflops=989, mfu_trainer=0.30, mfu_server=0.45)))
    # server / trainer FLOPs 0.61, 0.71, 0.84, 1.06, over 1.5
    assert [job.server_share for job in plan.pair_jobs] == pytest.approx([0.41, 0.47, 0.56, 0.70], rel=NEAR)
    assert plan.all_job.server_share == pytest.approx(0.47, rel=NEAR)
    assert plan.all_job.colocated_share == pytest.approx(1 / 1.47, rel=NEAR)
    # 989e12 x 0.30 / 75.7e9 = 3,919 images/s a GPU, 8 of them; 3,919 x 8 x 46.4e9 / (989e12 x 0.45) = 3.27 GPUs
    first = plan.pair_jobs[0]
    assert first.images_per_s == pytest.approx(8 * 3919, rel=NEAR) and first.server_gpus == pytest.approx(3.27, rel=NEAR)
    slower = planned(Cluster(gpu=Gpu(tflops=989, server_tflops=989 / 4)))
    assert slower.all_job.server_gpus == pytest.approx(4 * plan.all_job.server_gpus)
    assert slower.all_job.images_per_s == plan.all_job.images_per_s and slower.all_job.colocated_share == plan.all_job.colocated_share
    assert plan.server_gpus == 4 and slower.server_gpus == 16  # 3.76 and 15.05


@pytest.mark.parametrize(
    ("name", "wire_dtype", "kilobytes", "gbps", "carried"),
    [  # an image of a pair; 10^9 bits at 1,000, 5,000 and 20,000 images/s; images/s through 25, 100 and 400 Gb/s at 90 %
        ("hidden", "fp32", 808.9, (6.47, 32.4, 129.4), (3476, 13_905, 55_620)),
        ("hidden", "bf16", 405.5, (3.24, 16.2, 64.9), (6937, 27_747, 110_990)),
        ("image", "-", 152.5, (1.22, 6.1, 24.4), (18_440, 73_750, 295_000)),
        ("logits", "-", 2.0, (0.016, 0.08, 0.32), (1.406e6, 5.625e6, 22.5e6)),
    ],
)  # fmt: skip
def test_bytes_and_rates_are_those_of_the_table_worked_out_before(
    name: str, wire_dtype: str, kilobytes: float, gbps: tuple[float, ...], carried: tuple[float, ...]
) -> None:
    for rate, expected in zip((1000, 5000, 20_000), gbps, strict=True):
        one = payload(planned(Cluster(images_per_s=rate)), name, wire_dtype)
        assert one.pair_bytes[2] / 1e3 == pytest.approx(kilobytes, rel=NEAR) and one.pair_gbps[2] == pytest.approx(expected, rel=NEAR)
        assert len(set(one.pair_bytes[1:])) == 1
    for network, expected in zip((25, 100, 400), carried, strict=True):
        one = payload(planned(Cluster(network_gbps=network)), name, wire_dtype)
        assert one.pair_fits_per_s[2] == pytest.approx(expected, rel=NEAR)


def test_all_pairs_in_one_job_share_image_and_targets_and_many_jobs_add_up() -> None:
    plan = planned(Cluster(images_per_s=1000))
    hidden = payload(plan, "hidden", "bf16")
    # three states of 403,456 and an image of 150,528 + 8, four rows of logits of 2,000, one of fp32 targets
    assert hidden.all_bytes == 3 * 403_456 + 150_536 + 4 * 2000 + 4000
    assert hidden.all_bytes / 1e3 == pytest.approx(1369, rel=NEAR) and hidden.all_gbps == pytest.approx(11, rel=NEAR)
    assert sum(hidden.pair_gbps) == pytest.approx(8e-6 * (3 * 409_456 + 156_536))


@pytest.mark.parametrize(
    "settings",
    [
        ["student.moe.backend=loop"],
        ["student.moe.backend=fused", "student.moe.router.top_k=1"],
        ["student.moe.backend=loop", "student.moe.activation=swiglu", "meta.depths=[2,1,2]"],
        ["student.moe.backend=loop", "student.moe.placement=every", "student.mlp_ratio=4", "student.depths=[3,1,2]"],
        ["student.moe.backend=loop", "student.moe.router=expert_choice"],
        ["teacher.arch_args.reg_tokens=3", "teacher.arch_args.global_pool=avg", "teacher.arch_args.mlp_ratio=2", "student.depths=[1,1,1]"],
        ["teacher.arch=vit_base_patch16_siglip_224", "student.depths=[1,1,1]"],
        ["teacher.arch=vit_giant_patch14_dinov2", "student.patch_size=14", "student.depths=[1,1,1]"],
    ],
    ids=[
        "top-2",
        "top-1",
        "swiglu, deep meta",
        "half dense",
        "expert choice",
        "registers, mean",
        "attention pool",
        "swiglu teacher, other patches",
    ],
)
def test_flops_are_what_torch_counts_on_the_real_modules(settings: list[str]) -> None:
    config = apply_overrides(fashion(), settings)
    plan = plan_teacher(config, Cluster())
    meta_spans, student_arch = stage_spans(config.meta.depths), arch_from_config(config)
    meta = FrozenMeta({i: build_stage(VitArch.from_meta(config), span, seed=0) for i, span in enumerate(meta_spans)})
    images_BCHW = torch.randn(IMAGES, 3, 28, 28)
    pairs = teaching_pairs(config.teacher.depths, config.meta.depths, config.student.depths)
    for pair, job in zip(pairs, plan.pair_jobs, strict=True):
        teacher = freeze(build_stage(VitArch.from_teacher(config), pair.teacher, seed=0))
        stitches = stitch_specs(pair, teacher_width=plan.width, student_width=student_arch.embed_dim)
        student = VisionMoE(student_arch, pair.student, stitches=stitches, seed=0)
        hidden, prefix = count(lambda p=pair: meta.hidden_states(images_BCHW, [p])[p.index])
        assert hidden.shape[1:] == ((3, 28, 28) if pair.is_first else (plan.tokens, plan.width))
        output, module = count(lambda t=teacher, h=hidden: t(h))
        _, suffix = count(lambda p=pair, o=output: meta.suffix(p, o))
        assert (prefix, module, suffix) == (job.work.prefix, job.work.module, job.work.suffix)
        student_flops, suffix_flops = student_step(student, meta, pair, hidden)
        assert (student_flops, suffix_flops) == (job.work.student, job.work.student_suffix)


def count(run: object) -> tuple[Tensor, float]:
    """Result, and FLOPs an image. Attention by matrix products: torch's counter does not know the fused one of a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = run()  # type: ignore[operator]
    return result, counter.get_total_flops() / IMAGES


def student_step(student: nn.Module, meta: FrozenMeta, pair: object, hidden: Tensor) -> tuple[float, float]:
    """FLOPs an image of (student module, frozen suffix), each forward and backward."""
    output, forward = count(lambda: student(hidden).output)
    cut = output.detach().requires_grad_()
    logits_BV, suffix_forward = count(lambda: meta.suffix(pair, cut))  # type: ignore[arg-type]
    _, suffix_backward = count(lambda: logits_BV.sum().backward())
    _, backward = count(lambda: output.backward(cut.grad))
    return forward + backward, suffix_forward + suffix_backward


@pytest.mark.parametrize("decode", ["pil", "fast"])
def test_bytes_are_those_of_real_answers(decode: str, tmp_path: Path) -> None:
    make_source("digits", tmp_path)
    # Nothing random: no flips or boxes, whose few bytes the planner leaves out.
    settings = [
        f"data.decode={decode}", f"data.train={tmp_path / 'train'}", "data.augment.hflip=0", "teacher.arch_args.embed_dim=192",
        "m2mkd.precision=fp32",
    ]  # fmt: skip
    config = apply_overrides(fashion(), settings)
    plan = plan_teacher(config, Cluster())
    producer = tiny_producer(config)
    for name, wire_dtype in (("hidden", "fp32"), ("hidden", "bf16"), ("image", "-"), ("logits", "-")):
        expected = payload(plan, name, wire_dtype)
        for pairs, size in (((0,), expected.pair_bytes[0]), ((2,), expected.pair_bytes[2]), ((0, 1, 2), expected.all_bytes)):
            request = GetBatch(
                instance="", plan="", client="", layout=BatchLayout(micro_batch_size=2, accumulation=1, world=1), start=0, pairs=pairs,
                payload=name, wire_dtype="fp32" if wire_dtype == "-" else wire_dtype, with_teacher=True, attempt=0,  # type: ignore[arg-type]
            )  # fmt: skip
            answer = producer.answer(request)
            assert answer.num_bytes == 2 * size, (name, pairs, {key: tuple(t.shape) for key, t in answer.tensors.items()})


def tiny_producer(config: RunConfig) -> Producer:
    """A real producer with fresh weights."""
    pairs = teaching_pairs(config.teacher.depths, config.meta.depths, config.student.depths)
    meta = {i: build_stage(VitArch.from_meta(config), span, seed=0) for i, span in enumerate(stage_spans(config.meta.depths))}
    return Producer(
        TeacherParts(
            index=ShardIndex.load(config.data.train), data=config.data, seed=0, pairs=pairs, meta=FrozenMeta(meta),  # type: ignore[arg-type]
            teachers={p.index: build_stage(VitArch.from_teacher(config), p.teacher, seed=0) for p in pairs}, device=torch.device("cpu"),
            dtype=torch.float32,
        )
    )  # fmt: skip


def test_an_8_bit_state_carries_a_scale_for_128_numbers_of_a_token() -> None:
    plan = planned(Cluster())
    # 197 x (1024 + 8 scales of 4 bytes), logits 2,000, targets 4,000
    assert payload(plan, "hidden", "int8").pair_bytes[1] == 197 * (1024 + 32) + 6000


@pytest.mark.parametrize(
    ("decode", "network", "expected", "told"),
    [  # all pairs in one job of 8 A100: 3,119 images/s; hidden bf16 1.373 MB, image 158.5 KB or 614 KB, logits 8 KB
        ("fast", 100, "hidden", "payload=hidden wire_dtype=auto: 34.3 of 90 Gb/s and 4 server GPUs for 8 trainer GPUs"),
        ("fast", 25, "image", r"payload=image: 3.96 of 22.5 Gb/s .*; payload=hidden would need 34.3 Gb/s. Trainers run the prefix.$"),
        (
            "pil",
            10,
            "logits",
            r"payload=logits: 0.2 of 9 Gb/s .* read the shards themselves. With data.decode=fast, payload=image .* 3.96 ",
        ),
        ("fast", 0.1, None, r"feed=colocated or feed=replay, because the network carries 0.09 Gb/s and even payload=logits needs 0.2\."),
    ],
)
def test_the_first_payload_that_fits_is_recommended(decode: str, network: float, expected: str | None, told: str) -> None:
    plan = planned(Cluster(network_gbps=network), decode)
    assert (plan.recommended.payload if plan.recommended else None) == expected
    *_, last = format_plan(plan).strip().splitlines()
    assert last.startswith("Recommended: ")
    assert re.search(told, last), last
    # What fits is what needs at most 90 %.
    assert [one.fits for one in plan.traffic] == [one.all_gbps <= 0.9 * network for one in plan.traffic]


def test_the_text_holds_the_numbers_of_every_pair_and_payload() -> None:
    text = format_plan(planned(Cluster(epoch_images=1_281_167)))
    rows = {line.split("  ")[0].strip() or line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["1"] == ["1", "5.4", "30.7", "10.2", "46.4", "44.8", "20.8", "65.6", "111.9", "0.47", "11,419", "3.77"]
    assert rows["image"][:5] == ["image", "-", "152.5", "152.5", "158.5"] and rows["image"][-1] == "yes"
    assert "2.56 GB a pair and epoch" in text and "0.71 GB in bf16" in text and max(map(len, text.splitlines()[3:-5])) <= 140
    small = format_plan(plan_teacher(fashion(), Cluster(trainer_gpus=2, images_per_s=2000, network_gbps=1)))
    assert "MFLOP" in small and "3 pairs, hidden states of 17 x 96, fp32" in small and "Given: 2000 images a second" in small


def test_what_a_cluster_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="network_gbps is 0; it must be above 0$"):
        Cluster(network_gbps=0)
    with pytest.raises(ValueError, match="mfu_server is 1.5; it must be above 0 and at most 1"):
        Cluster(gpu=Gpu(mfu_server=1.5))
    with pytest.raises(ValueError, match="images_per_s is -1; it must not be negative"):
        Cluster(images_per_s=-1)
