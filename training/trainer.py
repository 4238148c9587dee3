"""The training loop."""

import dataclasses
import time
from typing import Any

import torch.distributed as dist

from conf.blend_plan import overrides_to_continue
from conf.override_text import command
from corpus.chat_stream import describe_example
from corpus.open_data import PartShares, example_chat, held_out_parts
from corpus.prepare import Prepared
from corpus.stream import TrainStream
from corpus.tokenizer import Tokenizer
from parallel.checkpoint import Checkpointer, NonFiniteState
from parallel.checkpoint_manifest import DATA_ORDER
from parallel.device_timer import StepTimer
from parallel.optimizer_state import first_nonfinite
from training.agreement import Agreement, severest
from training.batches import read_batches
from training.builder import BuiltModel
from training.console import Console
from training.errors import RunDirTakenOver, RunFailed
from training.evaluate import EvalResult, evaluate, evaluate_parts, request_windows
from training.expert_load_log import explain_drops
from training.generate import encode_prompt, generate
from training.load_initial import load_initial_weights
from training.lr_schedule import learning_rate, schedule_jump
from training.metrics import SHARE, RunLog
from training.nonfinite import SkipCounter
from training.preferences import open_data, set_reference
from training.profiler import Profiler
from training.requeue import DONE, STOPPED
from training.run_dir import RunDir
from training.run_files import METRICS, json_lines
from training.signals import FAIL, GO_ON, LEAVE, StopRequest
from training.step_metrics import StepMetrics
from training.training_tasks import TrainingTasks
from training.writing_command import writing_command


@dataclasses.dataclass
class Progress:
    """The counters of the training loop, which a checkpoint stores besides tensors."""

    step: int = 0
    samples: int = 0
    """Number of sequences consumed: the position in the training stream."""
    tokens: int = 0
    updates: int = 0
    """Number of steps whose update was applied."""
    world_size: int = 1
    data_order: int = 1
    """The version of the order of samples; 1 where a checkpoint has none."""


class Trainer:
    """Trains a model on this rank. Every rank calls every method together."""

    def __init__(self, built: BuiltModel, run_dir: RunDir, prepared: Prepared, console: Console, stop: StopRequest):
        self.built, self.config, self.run_dir, self.console = built, built.config, run_dir, console
        self.is_main = built.runtime.world.rank == 0
        self.stop = stop
        self.agreement = Agreement(built.runtime, run_dir, self.config, prepared, console, stop)
        self.storage = self.agreement.storage
        self.prepared = prepared
        self.tokenizer = Tokenizer.load(prepared.tokenizer, self.config.data.eod_token) if prepared.tokenizer else None
        # Bits per byte need the bytes of each token: known with a tokenizer, also for token files made elsewhere.
        self.byte_lengths = self.tokenizer.byte_lengths() if self.tokenizer else None
        ahead = built.runtime.world.local_rank == 0
        self.stream, self.windows = open_data(self.config, prepared, console.note, ahead=ahead)
        self.held_out_parts = held_out_parts(prepared, self.config)
        self.shares = PartShares(prepared, self.config) if self.config.data.kind == "blend" else None
        if self.tokenizer and (example := example_chat(self.stream)) is not None:
            console.note(describe_example(example, self.tokenizer))
        self.checkpointer = Checkpointer(run_dir.checkpoints, built.engine, self.config.checkpoint.keep)
        self.progress = Progress(world_size=built.runtime.world.size, data_order=DATA_ORDER)
        self.skips = SkipCounter(self.config.guard.max_skipped)
        self.tasks = TrainingTasks(built, run_dir, console, self.storage)
        self.metrics = StepMetrics(built)
        self.clock = StepTimer(built.runtime.device)
        self.explained_drops: str | None = None
        self.saved_step: int | None = None
        self.waited = 0.0
        """Seconds for which the pending checkpoint has blocked training."""

    def restore(self) -> None:
        """Resumes from the newest complete checkpoint, or loads initial weights (checkpoint.load). The weights that
        adapters are trained for are loaded in both cases."""
        settings, has_adapters = self.config.checkpoint, self.config.lora.rank is not None
        source = load_initial_weights(self.built, self.checkpointer, self.console) if has_adapters else None
        resumed = self.checkpointer.resume(self.console.warning, fresh=settings.resume == "fresh")
        if resumed is not None:
            source, state = resumed
            self.progress = Progress(**{**state, "world_size": self.progress.world_size})
            self.saved_step = self.progress.step
            self.console.note(f"continuing from {source}")
            if self.is_main and (changed := self.run_dir.changed_data(self.prepared)):
                self.console.warning(f"the data are not those of the earlier steps: {changed}")
            if self.is_main and (jump := schedule_jump(self._last_rate(), self.progress.step, self.config)):
                self.console.warning(jump)
        elif settings.load and not has_adapters:
            source = load_initial_weights(self.built, self.checkpointer, self.console)
        if isinstance(self.stream, TrainStream):
            self.stream.keep_order(self.progress.data_order)
        at = {"loaded": source, "step": self.progress.step}
        if done := set_reference(self.built, self.stream, self.windows, self.run_dir.path, **at):
            self.console.note(done)
        self.agreement.keep_settings()

    def _last_rate(self) -> float | None:
        """The learning rate of the restored step, if it was logged."""
        rows = [row for row in json_lines(self.run_dir.path / METRICS) if row.get("step") == self.progress.step]
        return next((row["lr"] for row in reversed(rows) if isinstance(row.get("lr"), float)), None)

    def progress_counters(self) -> tuple[int, tuple[int, int]]:
        """(current step, counters that increase while this rank makes progress), for the watchdog."""
        return self.progress.step + 1, (self.built.engine.forward_passes, self.checkpointer.stages)

    def run(self) -> int:
        """Trains to the last step. Returns DONE or STOPPED.

        Raises:
            RunFailed: too many consecutive updates were not finite, another process took over the run directory, or it
                cannot be written any more.
        """
        log = self._open_log()
        at, groups = self.progress, self.built.runtime.groups
        left = self.config.train.steps - at.step
        self.batches = read_batches(self.config, self.stream, groups, first_sample=at.samples, steps=left)
        if self.config.eval.every:
            for windows in (self.windows, *self.held_out_parts.values()):
                request_windows(self.built, windows, self.config.eval.batches)
        try:
            return self._run(log)
        finally:
            self.batches.close()
            if log:
                log.close()

    def _run(self, log: RunLog | None) -> int:
        config, train = self.config, self.config.train
        profiler = Profiler(train.profile, self.run_dir.path / "profile", enabled=self.is_main)
        last = min(train.steps, train.stop_after or train.steps)
        self.metrics.start(self.progress.step, self.skips.total)
        interrupted = self._heed(self.agreement.by_itself())
        while self.progress.step < last and not interrupted:
            step = self.progress.step + 1
            logged = step % train.log_every == 0 or step == last
            self.clock.start()
            profiler.before(step)
            norm, lr = self._step(logged=logged)
            self.clock.stop()
            profiler.after(step)
            if logged:
                self._log(log, norm=norm, lr=lr, seconds=self.clock.read())
            interrupted = self._heed(severest(self.built.engine.summed["states"]))
            # Before an evaluation, which may fail. Not while updates are being skipped, so that good checkpoints are
            # not replaced.
            if self._saves(step) and not self.skips.in_row:
                self.save()
            if config.eval.every and step % config.eval.every == 0 and step < last:
                evaluation = self._evaluate(config.eval.batches)
                self.console.evaluation(evaluation.row(step))
                self._log_evaluation(log, evaluation)
            if self.tasks.due(step) and step < last:
                self.tasks.run(step, log)
            self._finalize_save(wait=False)
        interrupted = self._heed(self.agreement.by_itself()) or interrupted
        self.save()
        self._finalize_save(wait=True)
        if interrupted and self.progress.step < train.steps:
            self.console.note(f"stopped by {self.stop.reason} after step {self.progress.step}")
            return STOPPED
        self._finish(log)
        self._heed(self.agreement.by_itself())
        return DONE

    def _saves(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        every = self.config.checkpoint.every
        return every > 0 and step % every == 0

    def _open_log(self) -> RunLog | None:
        log = None
        if self.is_main:
            with self.storage.recording_errors():
                log = RunLog(
                    self.run_dir.path,
                    restored_step=self.progress.step,
                    warn=self.console.warning,
                    loggers=self.config.logging.loggers,
                    settings=dataclasses.asdict(self.config),
                )
        return log

    def _heed(self, agreed: int) -> bool:
        """Whether the ranks, which have agreed on a state, stop after this step.

        Raises:
            RunFailed: another process took over the run directory; or it cannot be written any more, in which case a
                checkpoint of this step is written first.
        """
        if agreed == LEAVE:
            raise RunDirTakenOver(f"another process has taken over {self.run_dir.path}: this one ends without writing")
        if agreed == FAIL:
            if self.progress.step:
                self.saved_step = None  # the directory of that checkpoint may have been deleted
                self.save()
                self._finalize_save(wait=True)
            raise self.storage.failed(self.progress.step)
        return agreed != GO_ON

    def _step(self, *, logged: bool) -> tuple[float, float]:
        """Runs one optimizer step. Returns (gradient norm, learning rate).

        Everything that the ranks tell each other travels in the all-reduce of the gradient norm, of which the host has
        to know in the same step whether the update is applied: the loss, the state of each rank, and of a logged step
        the metrics.
        """
        train, step = self.config.train, self.progress.step + 1
        began = time.perf_counter()
        batches = self.batches.next()
        data = time.perf_counter() - began
        engine = self.built.engine
        engine.compute_gradients(batches, step=step)
        lr = learning_rate(step, self.config.optim, train.steps)
        beside = {"states": self.agreement.counts(look=self._saves(step))}
        if logged:
            self.metrics.stragglers.add(data=data, compute=engine.compute_timer.seconds())
            beside |= self.metrics.local()
        norm, applied = engine.update(lr, beside=beside)
        if not logged:  # by now the GPU has done the step's work, and nobody waits for it
            self.metrics.stragglers.add(data=data, compute=engine.compute_timer.seconds())
        if applied:
            self.skips.applied()
            self.progress.updates += 1
        else:
            named: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(named, engine.nonfinite_gradients())
            culprits = sorted({f"gradient of {name}" for part in named for name in part})[:3]
            self.console.warning(self.skips.skipped(step, culprits))
            self._check_state(step)
        self.progress.step = step
        self.progress.samples += train.global_batch_size
        self.progress.tokens += train.global_batch_size * train.sequence_length
        return norm, lr

    def _check_state(self, step: int) -> None:
        """Checks the model after a skipped update.

        Raises:
            RunFailed: weights or moments are not finite, so that no later update can be applied.
        """
        broken = first_nonfinite(self.built.engine)
        if broken:
            good = f"is step {self.saved_step}" if self.saved_step else "is none"
            raise RunFailed(
                f"step {step}: {broken} is not finite, so that every later update would be skipped. The last good "
                f"checkpoint {good}: the same command continues from there; lower optim.lr if it happens again"
            )

    def _log(self, log: RunLog | None, *, norm: float, lr: float, seconds: float) -> None:
        """Logs the current step."""
        step, metrics = self.progress.step, self.metrics
        how = {"norm": norm, "lr": lr, "seconds": seconds}
        sums, tokens, skipped = self.built.engine.summed, self.progress.tokens, self.skips.total
        row = metrics.row(sums, step=step, tokens=tokens, skipped=skipped, **how)
        if self.shares and self.progress.data_order == DATA_ORDER:
            end = self.progress.samples
            shares = self.shares.between(end - metrics.steps * self.config.train.global_batch_size, end)
            row |= {f"{SHARE}{name}": share for name, share in shares.items()}
        if not log:
            return
        with self.storage.recording_errors():
            log.step(row, metrics.load, metrics.mtp_losses)
        self.console.step(row, self.config.train.steps)
        if metrics.load and not self.explained_drops:
            self.explained_drops = explain_drops(self.config.model.moe, row["dropped_fraction"])
            if self.explained_drops:
                self.console.note(f"step {step}: {self.explained_drops}")
        if warning := metrics.stragglers.straggler_warning(row):
            self.console.warning(warning)

    def _log_evaluation(self, log: RunLog | None, evaluation: EvalResult) -> None:
        if log:
            with self.storage.recording_errors():
                log.evaluation(evaluation.row(self.progress.step))

    def _evaluate(self, batches: int | None) -> EvalResult:
        result = evaluate(self.built, self.windows, self.byte_lengths, batches=batches)
        return dataclasses.replace(result, parts=evaluate_parts(self.built, self.held_out_parts, batches=batches))

    def save(self) -> None:
        """Saves a checkpoint of the current step, unless there is one; with checkpoint.asynchronous, starts saving.

        Raises:
            RunFailed: weights or moments are not finite.
        """
        if self.saved_step == self.progress.step:
            return
        self._finalize_save(wait=True)
        started = time.perf_counter()
        try:
            with self.storage.as_run_failure():
                self.checkpointer.begin_save(dataclasses.asdict(self.progress))
        except NonFiniteState as failure:
            raise RunFailed(f"{failure}. Lower optim.lr, or inspect the data of this step") from None
        self.saved_step, self.waited = self.progress.step, time.perf_counter() - started
        if not self.config.checkpoint.asynchronous:
            self._finalize_save(wait=True)

    def _finalize_save(self, *, wait: bool) -> None:
        """Completes the pending checkpoint if it is written, or waits for it."""
        started = time.perf_counter()
        with self.storage.as_run_failure():
            path = self.checkpointer.finalize_save(wait=wait)
        if path is not None:
            waited = self.waited + time.perf_counter() - started
            blocked = f"; training waited {waited:.2f} s for it" if self.config.checkpoint.asynchronous else ""
            self.console.note(f"checkpoint {path}{blocked}")

    def _finish(self, log: RunLog | None) -> None:
        """Evaluates and prints the summary of the run: held-out loss, expert load, a sample, paths."""
        held_out = self._evaluate(self.config.eval.final_batches)
        self._log_evaluation(log, held_out)
        self.tasks.run(self.progress.step, log)
        sample = self._sample()
        path = self.run_dir.path
        self.console.summary(
            held_out.row(self.progress.step),
            gzip_bits_per_byte=self.prepared.gzip_bits_per_byte(),
            load=self.metrics.load,
            sample=sample,
            paths=[
                ("run directory", str(path)),
                ("checkpoint", str(self.run_dir.checkpoints / f"step_{self.progress.step:08d}")),
                ("charts", command([".venv/bin/tensorboard", "--logdir", str(path)], [])),
                *writing_command(self.config, path, has_tokenizer=self.tokenizer is not None),
                *(("continue", line) for line in self._continuing()),
            ],
        )

    def _continuing(self) -> list[str]:
        """The command that continues the run to twice its steps, if it can go on."""
        more = overrides_to_continue(self.config)
        return [] if more is None else [self.run_dir.command(2 * self.config.train.steps, more)]

    def _sample(self) -> tuple[str, str] | None:
        settings = self.config.eval
        if not settings.sample_tokens or self.tokenizer is None:
            return None
        prompt = encode_prompt(self.tokenizer, settings.sample_prompt)
        tokens = generate(
            self.built,
            prompt,
            max_tokens=settings.sample_tokens,
            temperature=0.8,
            top_k=None,
            top_p=0.95,
            seed=self.config.train.seed,
            eod_id=self.tokenizer.eod_id,
        )
        return settings.sample_prompt, self.tokenizer.decode(list(tokens))
