"""Run by a launcher, in several processes: each check compares what they do together with what one does alone.

Arguments: a folder for files. Every process writes ``checks_RANK.json``: name of the check → "" or what is wrong.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch

torch.set_num_threads(1)

from small import (
    LATENTS,
    NO_EDIT,
    PATCHES,
    SmallDenoiser,
    StopAfter,
    conditioning,
    encoders,
    parts,
    pictures,
    prepared_pairs,
    settings,
    trainer,
    weights,
)

from editloss_core import losses
from editloss_core.hard_negatives import HardNegativeBuffer
from editloss_core.lora.lora import LoRA, LoRASettings
from editloss_core.objective import TERMS, EditObjective, LossTerm
from editloss_core.pairs import PairProblems, PairSet
from editloss_core.processes import Processes, leave
from editloss_core.runs.checkpoint import CHECKPOINT_FOLDER, checkpoints
from editloss_core.runs.log import LOG_FILE, RunLog
from editloss_core.training import prepare as preparation
from editloss_core.training.estimate import EstimateObjective
from editloss_core.training.gradients import NonFinite
from editloss_core.training.own_failures import FOLDER
from editloss_core.training.prepare import prepare
from editloss_core.training.trainer import Trainer

CHECKS = {}
NCE = LossTerm("info_nce", PATCHES, name="in batch", weight=0.3)
GATED = replace(NO_EDIT, name="gated", t_min=0.3, t_max=0.7)
APART = EditObjective((NO_EDIT, replace(GATED, name="low", encoder=PATCHES, t_min=0.0), LossTerm(
    "overlay_avoidance", PATCHES, name="overlay", weight=0.7, t_min=0.5)))  # fmt: skip
EVERYTHING = EditObjective((NO_EDIT, NCE, GATED, LossTerm("overlay_avoidance", PATCHES, name="overlay", weight=0.7)))
RUN = {"steps": 6, "batch_size": 3, "accumulation": 2, "ema": 0.9, "schedule": "cosine", "objective": EVERYTHING,
       "checkpoint_every": 2, "validate_every": 3, "estimate_weighting": "inverse_square", "preview_steps": 2,
       "previews": 3}  # fmt: skip


def check(function):
    CHECKS[function.__name__] = function
    return function


def pairs():
    """Seven: batches of three leave one, on which one of two processes has nothing to do."""
    return prepared_pairs(7)


def make(accelerator=None, folder=None, prepared=None, **changes):
    prepared = prepared or pairs()
    held_out = prepared_pairs(3, seed=9, names="held out")
    return trainer(folder, prepared=prepared, validation=held_out, accelerator=accelerator, **{**RUN, **changes})


@functools.cache
def alone():
    """The run in one process that was never stopped."""
    made = make()
    return made, made.run()


def close(a, b, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def same_run(result, expected, first=0):
    """The LoRA, every number of the log from step ``first`` on, and the pictures, but for rounding."""
    for name, value in weights(expected.lora).items():
        close(weights(result.lora)[name], value, atol=2e-6)
    assert [s.step for s in result.log.steps] == [s.step for s in expected.log.steps]
    for one, other in zip(result.log.steps[first:], expected.log.steps[first:]):
        assert [(s.pair, s.t, list(s.terms)) for s in one.samples] == [
            (s.pair, s.t, list(s.terms)) for s in other.samples
        ]
        close([one.loss, one.gradient_norm], [other.loss, other.gradient_norm])
        for a, b in zip(one.samples, other.samples):
            for name in a.terms:
                for field in ("raw", "weighted", "open", "gradient"):
                    x, y = getattr(a.terms[name], field), getattr(b.terms[name], field)
                    assert (x is None) == (y is None), (name, field)
                    if x is not None:
                        close(x, y)
    assert [v.step for v in result.log.validations] == [v.step for v in expected.log.validations]
    for one, other in zip(result.log.validations, expected.log.validations):
        for field in ("velocity", "velocity_base", "terms", "terms_base", "noise_levels"):
            close(getattr(one, field), getattr(other, field))
    assert [row.pair for row in result.pictures] == [row.pair for row in expected.pictures]
    for one, other in zip(result.pictures, expected.pictures):
        close(one.lora, other.lora, atol=1e-5)
        close(one.base, other.base)


# -- losses -----------------------------------------------------------------------------------------------------------


def _of_every_loss():
    """Name of a public loss → its value for predictions ``[5, 3, 8]``, everything else being constant."""
    g = torch.Generator().manual_seed(1)
    gt, src, other = torch.randn(3, 5, 3, 8, generator=g, dtype=torch.float64)
    several = torch.randn(5, 2, 3, 8, generator=g, dtype=torch.float64)
    bank = torch.randn(6, 8, generator=g, dtype=torch.float64)
    tokens, samples = (
        torch.rand(5, 3, generator=g, dtype=torch.float64),
        torch.rand(5, generator=g, dtype=torch.float64),
    )
    labels = torch.tensor([1, 0, 1, 0, 1])

    def distances(p, *references):
        return [losses.aggregate_tokens(d, "mean") for d in losses.token_distances(p, list(references))]

    return {
        "pair_distance": lambda p: losses.pair_distance(p, gt, weights=tokens).mean(),
        "feature_match_loss": lambda p: losses.feature_match_loss(p, gt, "l1", weights=samples),
        "contrastive_pair_loss": lambda p: losses.contrastive_pair_loss(p, gt, labels, margin=4.0),
        "contrastive_on_distances": lambda p: losses.contrastive_on_distances(distances(p, gt)[0], labels, 1.5),
        "triplet_margin_loss": lambda p: losses.triplet_margin_loss(p, gt, src, "auto", weights=tokens, smooth=0.1),
        "margin_ranking_on_distances": lambda p: losses.margin_ranking_on_distances(*distances(p, gt, src), 0.5),
        "multi_negative_ranking_loss": lambda p: losses.multi_negative_ranking_loss(p, gt, several, 0.5, neg_agg="max"),
        "multi_negative_ranking_loss, negatives shared": lambda p: losses.multi_negative_ranking_loss(
            p, gt, [p.roll(k, 0) for k in (1, 2)], 0.5, neg_agg="sum", agg="max"
        ),
        "info_nce_loss": lambda p: losses.info_nce_loss(p, gt, agg="sum", weights=tokens),
        "info_nce_loss, predictions as the bank": lambda p: losses.info_nce_loss(gt, p, weights=samples),
        "info_nce_loss, largest": lambda p: losses.info_nce_loss(p, p + gt, agg="max", reduction="sum"),
        "info_nce_loss, a bank": lambda p: losses.info_nce_loss(p, gt, bank),
        "info_nce_on_distances": lambda p: losses.info_nce_on_distances(distances(p, gt)[0], torch.stack(distances(p, src, other), 1)),
        "loss_no_edit_identity": lambda p: losses.loss_no_edit_identity(p, gt, src, weights=tokens),
        "loss_geometry_match": lambda p: losses.loss_geometry_match(p, gt),
        "loss_overlay_avoidance": lambda p: losses.loss_overlay_avoidance(p, gt, several, weights=samples),
    }  # fmt: skip


@check
def gradients_of_every_loss(accelerator, folder):
    processes, every = Processes(accelerator), _of_every_loss()
    helpers = {"aggregate_tokens", "margin_fraction", "token_distances"}
    assert {name.split(",")[0] for name in every} == set(losses.__all__) - helpers, "a loss is missing here"
    pred = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows = processes.rows(5)
    real = [k for k, i in enumerate(rows) if k + processes.rank * len(rows) < 5]
    for name, loss in every.items():
        leaf = pred.clone().requires_grad_()
        expected = loss(leaf)
        (whole,) = torch.autograd.grad(expected, leaf)
        own = pred[rows].clone().requires_grad_()
        found = loss(processes.whole(own, 5))
        (gradient,) = torch.autograd.grad(found, own)
        close(found, expected, 1e-12, 1e-12)
        assert whole[[rows[k] for k in real]].abs().max() > 1e-4, f"{name}: nothing to compare"
        close(gradient[real], whole[[rows[k] for k in real]], 1e-9, 1e-12)
        assert not gradient[[k for k in range(len(rows)) if k not in real]].any(), name


def _terms():
    """Every kind of term over both encoders, with and without a gate."""
    made = EditObjective()
    for kind, entry in TERMS.items():
        negative = {"negative": "overlay"} if entry.defaults.get("negative") == "hard_negative" else {}
        for encoder, gate in ((LATENTS, {}), (PATCHES, {"t_min": 0.35, "t_max": 0.8}), (PATCHES, {"t_min": 0.93})):
            made = made.with_term(LossTerm(kind, encoder, weight=0.5, **negative, **gate))
    return made.with_term(LossTerm("info_nce", PATCHES, positive="src", token_weights="difference", temperature=0.5))


@check
def gradients_of_every_term(accelerator, folder):
    processes, prepared, batch = Processes(accelerator), prepared_pairs(5), [3, 0, 4, 1, 2]
    x0 = prepared.after(batch) + 0.3 * torch.randn(5, 12, 4, 4, generator=torch.Generator().manual_seed(3))
    rows = processes.rows(5)
    for t in (torch.tensor([0.1, 0.5, 0.9, 0.4, 0.95]), torch.tensor([0.1, 0.2, 0.95, 0.3, 0.1])):
        found = []
        for together in (False, True):
            own = (x0[rows] if together else x0).clone().requires_grad_()
            objective = EstimateObjective(
                _terms(), encoders(), prepared, parts()[0].decode, processes=processes if together else None
            )
            report = objective(own, batch, t, 1 / t)
            found.append((report, torch.autograd.grad(report.total, own)[0]))
        (alone, whole), (shared, gradient) = found
        assert [r.term for r in shared.terms] == [r.term for r in alone.terms]
        for one, other in zip(shared.terms, alone.terms):
            for field in ("value", "per_sample", "weighted_per_sample", "open", "sample_weights"):
                close(getattr(one, field), getattr(other, field))
        for k, i in enumerate(rows):
            if k + processes.rank * len(rows) < 5:
                assert whole[i].abs().max() > 1e-3
                close(gradient[k], whole[i])


# -- runs -------------------------------------------------------------------------------------------------------------


@check
def a_run_ends_as_in_one_process(accelerator, folder):
    made = make(accelerator)
    rank = accelerator.process_index
    result = made.run()
    same_run(result, alone()[1])
    everyone = Processes(accelerator).gather([weights(result.lora)])
    assert all(torch.equal(everyone[0][name], everyone[rank][name]) for name in everyone[0]), "the same to the last bit"
    assert any("batch_size 3" in note for note in made.notes)


@check
def sample_by_sample_a_run_ends_as_in_one_process(accelerator, folder):
    """No term looks across the batch: each process differentiates one sample at a time, of three pairs one has two."""
    changes = {"objective": APART, "steps": 4, "validate_every": 0, "accumulation": 1}
    lone = make(**changes)
    assert lone.objective.apart(torch.ones(3)) and not make().objective.apart(torch.ones(3))
    made = make(accelerator, **changes)
    same_run(made.run(), lone.run())
    read = {frozenset({"low", "overlay"} & set(s.terms)) for step in lone.log.steps for s in step.samples}
    assert len(read) > 1, "gates differ from sample to sample"


@check
def own_failures_of_one_process_are_everyone_s(accelerator, folder):
    """Each process samples some of the pairs, process 0 writes, and all hold the same."""
    term = LossTerm("multi_negative", PATCHES, name="failed", dist="l2", margin=5.0)
    changes = {"objective": EditObjective((*EVERYTHING.terms, term)), "own_failures_every": 2, "rollout_steps": 2,
               "steps": 4, "accumulation": 1, "validate_every": 0}  # fmt: skip
    processes, place = Processes(accelerator), folder / "failures"
    made = make(accelerator, place, **changes)
    result = made.run()
    batch = made._batch(2)
    src = made.prepared.embeddings(batch, [PATCHES]).get("src", PATCHES)
    held = processes.gather([made.failures.embeddings(batch, PATCHES, src)])
    assert len(batch) == 3 and torch.equal(held[0], held[1])
    if processes.main:
        lone = make(None, folder / "failures alone", **changes)
        expected = lone.run()
        close(
            held[0], lone.failures.embeddings(batch, PATCHES, src), rtol=1e-2, atol=2e-2
        )  # 8 bits may round otherwise
        found, single = ([(e.key, e.step, e.note) for e in HardNegativeBuffer(f / FOLDER).entries()]
                         for f in (place, folder / "failures alone"))  # fmt: skip
        assert found == single and 0 < len(found) <= 3 and {step for _, step, _ in found} == {3}
        for name, value in weights(expected.lora).items():
            close(weights(result.lora)[name], value, atol=1e-3)
        assert all("failed" in s.terms for s in result.log.steps[-1].samples)
    processes.wait()


@check
def a_base_that_is_shared_out_gives_the_same(accelerator, folder):
    """FSDP's shards of frozen weights, beside which the LoRA stands; accelerate calls the same function on GPUs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    denoiser = SmallDenoiser(checkpointing=True)
    lora = LoRA(denoiser.module, LoRASettings(rank=4, alpha=4.0, layers="all"), seed=0)
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    whole = sum(p.numel() for p in denoiser.module.parameters())
    for block in (*denoiser.module.blocks, denoiser.module):
        fully_shard(block, mesh=mesh)
    local = sum(p.to_local().numel() for p in denoiser.module.parameters())
    assert local < 0.6 * whole
    objective, held_out = EVERYTHING, prepared_pairs(3, seed=9, names="held out")
    changes = {k: v for k, v in RUN.items() if k != "objective"}
    made = Trainer(
        denoiser, lora, pairs(), conditioning(7), settings(**changes), objective=objective, encoders=encoders(),
        decode=parts()[0].decode, validation=held_out, validation_conditioning=conditioning(3), accelerator=accelerator,
    )  # fmt: skip
    same_run(made.run(), alone()[1])


@check
def resuming_with_another_number_of_processes(accelerator, folder):
    processes = Processes(accelerator)
    for first, then in ((accelerator, None), (None, accelerator)):
        place = folder / ("fewer" if then is None else "more")
        for step, together in ((3, first), (None, then)):
            if together is not None or processes.main:
                made = make(together, place, host=None if step is None else StopAfter(step))
                if step is None:
                    assert RunLog.read(place).events[-1].event == "stopped"
                    made.resume(checkpoints(place / CHECKPOINT_FOLDER)[-1])
                    assert made.step == 3 and not any("other settings" in note for note in made.notes), made.notes
                    same_run(made.run(), alone()[1])
                else:
                    try:
                        made.run()
                    except KeyboardInterrupt:
                        pass
            processes.wait()
        if processes.main:
            log = [json.loads(line) for line in (place / LOG_FILE).read_text().splitlines()]
            assert [e["step"] for e in log if e["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
            assert [e["step"] for e in log if e["kind"] == "validation"] == [3, 6]
            assert [p.name for p in checkpoints(place / CHECKPOINT_FOLDER)] == [
                f"step_{step:06d}.safetensors" for step in (3, 4, 6)
            ]
            assert len(list((place / "pictures").glob("*lora*"))) == 6
        processes.wait()


@check
def what_is_not_finite_stops_all(accelerator, folder):
    for what, told in (
        ("loss", "the loss of 'velocity' is nan"),
        ("gradient", "the gradient of 'in batch' is not finite"),
    ):
        # A term that only watches and has no finite gradient must not be a reason to stop.
        watching = LossTerm("feature_match", PATCHES, name="watched", weight=0.0)
        objective = EditObjective((NO_EDIT, watching, *EVERYTHING.terms[1:]))
        made = make(accelerator, folder / what, validate_every=0, objective=objective)
        if what == "loss":
            made.conditioning[5] = made.conditioning[5] * math.nan
        else:
            decode = made.objective.decode

            def broken(z):
                pixels = decode(z)
                bad = (z - z).square().sum().sqrt() if made.step == 2 else 0.0  # its gradient is NaN
                return pixels + bad * 0

            made.objective.decode = broken
        try:
            made.run()
        except NonFinite as error:
            message = str(error)
        assert told in message, message
        assert len(set(Processes(accelerator).gather([message.splitlines()[0]]))) == 1, "the same in every process"
        if accelerator.is_main_process:
            assert ("step_000002" in message) == (what == "gradient"), message


@check
def held_out_pairs_that_are_not_finite_stop_all(accelerator, folder):
    made = make(accelerator, steps=3)
    made.validator.conditioning[1] = made.validator.conditioning[1] * math.nan
    try:
        made.run()
        raise AssertionError("did not stop")
    except NonFinite as error:
        assert "held out 1" in str(error) and "validation after step 3" in str(error)


@check
def processes_that_do_not_fit_together_are_refused(accelerator, folder):
    for changes, told in (
        ({"seed": accelerator.process_index}, "other settings in process 1"),
        ({"lora": {"alpha": 2.0 + accelerator.process_index}}, "other lora in process 1"),
        ({"batch_size": 1}, "at least one pair for each of 2 processes, got 1"),
    ):
        try:
            make(accelerator, **changes).run()
            raise AssertionError(f"{told}: was not refused")
        except ValueError as error:
            assert told in str(error), error


# -- what is prepared and told ----------------------------------------------------------------------------------------


@check
def preparing_is_shared_out(accelerator, folder):
    processes, whole = Processes(accelerator), prepared_pairs(7)
    _, vae, patches = parts()
    for cache in (folder / "cache", None):
        made = []

        class Counting(preparation._Work):
            def _embed(self, encoder, index, *rest, made=made):
                made.append((encoder.info.name, index))
                return super()._embed(encoder, index, *rest)

        own = preparation._Work
        preparation._Work = Counting
        try:
            progress = []
            found = prepare(
                whole.pairs, vae, encoders(), cache, overlay=whole.overlay, accelerator=accelerator,
                progress=lambda done, total, seen=progress: seen.append((done, total)),
            )  # fmt: skip
        finally:
            preparation._Work = own
        assert progress[-1][0] == progress[-1][1]
        everyone = processes.gather([sorted(made)])
        if cache is None:
            assert all(len(m) == 14 for m in everyone)
        else:
            assert sorted(sum(everyone, [])) == sorted((n, i) for n in encoders() for i in range(7)), "each once"
            assert min(map(len, everyone)) >= 6
        close(found.after(range(7)), whole.after(range(7)), 0, 0)
        for key, value in whole.embeddings(range(7)).tensors.items():
            close(found.embeddings(range(7)).tensors[key], value)


@check
def pairs_that_cannot_be_prepared_are_one_report(accelerator, folder):
    before, after, mask = pictures(5, seed=4)
    mask[[1, 4]] = (before[[1, 4]] == after[[1, 4]]).all(-1).float()  # where nothing was edited
    found, (_, vae, _) = PairSet.from_images(before, after, mask, "edit", min_size=16), parts()
    reports = []
    for cache in (folder / "unedited", None):
        try:
            prepare(found, vae, encoders(), cache, accelerator=accelerator)
        except PairProblems as error:
            reports.append(str(error))
    assert len(set(Processes(accelerator).gather(reports))) == 1 and len(reports) == 2, reports
    assert "pair 2" in reports[0] and "pair 5" in reports[0], reports[0]


@check
def trackers_carry_every_term(accelerator, folder):
    from accelerate.utils import LoggerType

    accelerator.log_with, accelerator.project_configuration.logging_dir = [LoggerType.TENSORBOARD], str(folder / "told")
    try:
        result = make(accelerator, folder / "tracked").run()
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.log_with, accelerator.trackers = [], []
    Processes(accelerator).wait()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "told" / "tracked")).Reload()
    scalars = {name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]}
    for step in result.log.steps:
        assert any(s == step.step and math.isclose(v, step.loss, rel_tol=1e-5) for s, v in scalars["train/loss"])
        for name in {n for s in step.samples for n in s.terms}:
            said = dict(scalars[f"loss/{name}"])[step.step]
            assert math.isclose(said, step.term(name), rel_tol=1e-5), name
    terms = {"velocity", *(term.name for term in EVERYTHING.terms)}
    for group in ("loss", "weighted", "gradient"):
        assert {n.split("/")[1] for n in scalars if n.split("/")[0] == group} == terms, group
    for group in ("validation", "validation_base"):
        assert {n.split("/")[1] for n in scalars if n.split("/")[0] == group} == terms - {"in batch"}
        assert [s for s, _ in scalars[f"{group}/velocity"]] == [3, 6]


def main(folder: Path) -> None:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=60))])
    found = {}
    for name, function in CHECKS.items():
        try:
            function(accelerator, folder)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        place = folder / f"checks_{accelerator.process_index}.json"
        place.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
