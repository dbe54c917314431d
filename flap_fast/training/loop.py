"""The training loop.

    batch -> augment, mask -> model -> losses -> backward      step.py: one pass, or two
          -> engine.step -> observers -> checkpoint -> evaluation

setup.py builds what a run has before its first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config
from flap_fast.data.shards import ShardError
from flap_fast.evaluation.scores_file import Scores
from flap_fast.files import say
from flap_fast.progress import starting
from flap_fast.ranks import Ranks
from flap_fast.ranks.agreement import Facts, agree
from flap_fast.ranks.failure import Ended, joined
from flap_fast.training.facts import checkpoint_facts, settings_facts
from flap_fast.training.guarded import Observer
from flap_fast.training.observers import report_bad_clips
from flap_fast.training.optimizers import learning_rate
from flap_fast.training.run_folder import begin
from flap_fast.training.run_lock import run_lock
from flap_fast.training.setup import Run, check_run, set_up
from flap_fast.training.step import Gradients

_A_CONFIG, _LOAD = "be a Config", "read one with flap_fast.load_config(FILE)"


class Stopped(Ended):
    """A signal stopped the run after `step`; it resumes from `checkpoint`."""

    def __init__(self, step: int, checkpoint: Path):
        super().__init__(f"stopped after step {step}, saved in {checkpoint}")
        self.step, self.checkpoint = step, checkpoint


def train(
    config: Config, *, resume: bool = False, observers: Sequence[Observer] = ()
) -> Scores | None:
    """Train a run to its end; returns its last scores on data.val, if there are any.

    Args:
        config: as of `flap_fast.load_config("configs/demo.yaml", ["run.name=mine"])`.
        resume: continue from the run's last checkpoint; without one, start at step 0.
        observers: functions of a row of metrics.jsonl, `{"step": 20, "loss": 3.1, ...}`, called on
            the first rank after the run's own. One that raises is named on stderr and left out.

    Raises:
        ConfigError: before anything is loaded, where it can be seen then.
        ShardError: a clip of data.val cannot be scored; the step before it is saved.
        Stopped: on SIGINT or SIGTERM, after a checkpoint was saved.
        NotFinite: NaN or infinity; the checkpoints before it are kept.
        RanksError: over ranks, an error of any of them before the first step, or a difference.
        SaidElsewhere: over ranks, an error that another one raises.
    """
    require(isinstance(config, Config), "config", _A_CONFIG, type(config).__name__, _LOAD)
    listed = isinstance(observers, (list, tuple)) and all(map(callable, observers))
    require(listed, "observers", "be a list of functions of a row", observers)
    with joined() as ranks, ExitStack() as open_files:

        def checked() -> tuple[None, Facts]:
            check_run(config, resume=resume)
            return None, settings_facts(config, ranks) if ranks.world > 1 else {}

        def locked() -> tuple[Path | None, Facts]:
            open_files.enter_context(run_lock(config, ranks))
            start = begin(config, resume=resume)
            return start, checkpoint_facts(start)

        with starting("check the run"):
            agree(ranks, checked)
        return train_from(config, ranks, agree(ranks, locked), open_files, observers)


def train_from(
    config: Config,
    ranks: Ranks,
    start: Path | None,
    open_files: ExitStack,
    observers: Sequence[Observer] = (),
) -> Scores | None:
    """Train from a checkpoint, or from step 0. Collective: call on every rank."""
    run = set_up(config, ranks, start, open_files, observers)
    engine, loader, steps = run.engine, run.loader, run.steps
    if run.unscored:
        improved = run.scorer.score(run.first)
        run.checkpoints.mark_scored(run.first, run.scorer.best, is_best=improved)

    if steps == 0 and start is None:
        save_and_score(run, 0, stopped=False)
    per_epoch = loader.sampler.steps_per_epoch
    gradients = Gradients(config, ranks, engine, steps, per_epoch, run.frozen, run.teacher)
    batches = run.metrics.timed(loader.batches(run.first, steps, times=gradients.reads))
    for step in range(run.first + 1, steps + 1):
        if run.scorer.out_of_patience:
            say_early(run, step - 1)
            break
        outputs, terms = gradients(step, batches)
        report_bad_clips(config.run_folder, ranks, loader.bad)
        lr = learning_rate(step - 1, config.sched, base=config.optim.lr, steps=steps)
        terms["grad_norm"] = engine.step(lr)
        # Still on the device: an observer that wants a number pays for its own sync.
        epoch, work = loader.sampler.epoch(step - 1), loader.work(step - 1)
        run.metrics.step(step, epoch, lr, outputs, terms, work)
        run.trace({"step": step})
        save_and_score(run, step, stopped=run.stop.agreed() and step < steps)
    run.frozen.delete()
    return run.scorer.final_scores()


def save_and_score(run: Run, step: int, *, stopped: bool) -> None:
    """Write the checkpoint and run the evaluation that are due after a step."""
    config, checkpoints, scorer = run.config, run.checkpoints, run.scorer
    to_score = bool(config.data.val) and due(step, run.steps, config.eval.every_steps)
    saved = None
    if stopped or due(step, run.steps, config.ckpt.every_steps):
        run.metrics.check_finite()
        saved = checkpoints.save(run.engine, step, scorer.best, scored=not to_score)
        if stopped:
            raise Stopped(step, saved)
    if not to_score:
        return
    try:
        improved = scorer.score(step)
    except (ConfigError, ShardError):  # of data.val, on all ranks; --resume scores this step
        if not saved:
            checkpoints.save(run.engine, step, scorer.best, scored=False)
        raise
    if saved:
        checkpoints.mark_scored(step, scorer.best, is_best=improved)
    elif improved or scorer.out_of_patience:
        checkpoints.save(run.engine, step, scorer.best, is_best=improved)


def say_early(run: Run, step: int) -> None:
    """Say on stderr that the run ends before its last step."""
    best, folder = run.scorer.best, run.checkpoints.folder
    if best and run.ranks.first:
        kept = f"; the best is {folder / 'best'}" if run.config.ckpt.keep_best else ""
        say(
            f"ended early, after step {step} of {run.steps}: {best.since} evaluations in a row "
            f"were no better than {best.score:.4f} ({best.task}){kept}",
            error=True,
        )


def due(step: int, steps: int, every: int) -> bool:
    """Whether something that happens every `every` steps, and at the last one, happens now."""
    return step == steps or (every > 0 and step % every == 0)
