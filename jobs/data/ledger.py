"""What a run's workers tell one actor: images done, for the driver to show, and work begun that has not ended.

A worker whose settings do not serve it, as credentials that only the driver has, tells that too: the driver would
otherwise learn of it as of an error in our code (`settings_of_workers`).

A worker process may die in its work: a decoder's crash, too little memory, a lost node. Ray starts it again and hands
it the same block, and would do so for ever if an image of the block is what kills it. So a worker says what it begins;
one that hangs in it ends itself (`jobs.data.watchdog`), which is a death like any other.
A block that was begun and not ended before is taken image by image; an image that, alone, took `DEATHS` processes with
it becomes one row with status `crashed`, and everything else of the block is labelled.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.data.schema import FAILED, Status
from jobs.data.watchdog import ended_if_it_hangs
from jobs.telemetry import progress_bar
from mgmtn.errors import CheckpointError, ConfigError, MgmtnError

log = logging.getLogger(__name__)

DEATHS: Final = 2  # one may be chance: a node that is lost, another process that takes all memory


class Ledger:
    """Lives in an actor, beside the driver: if it died, counts would start anew."""

    def __init__(self) -> None:
        self._outcomes: Counter[str] = Counter()
        self._begun: Counter[str] = Counter()
        self._refusal: MgmtnError | None = None

    def add(self, counts: dict[str, int]) -> None:
        """Count finished images by status, and `faces`."""
        self._outcomes.update(counts)

    def outcomes(self) -> Counter[str]:
        """What `add` was told so far."""
        return self._outcomes

    def begin(self, work: str) -> int:
        """Note that a piece of work begins; how often it was begun before and not ended."""
        before = self._begun[work]
        self._begun[work] += 1
        return before

    def end(self, work: str) -> None:
        """Note that it has ended, and that nobody died of it."""
        del self._begun[work]

    def refuse(self, error: MgmtnError) -> None:
        """Note why no worker can do the work."""
        self._refusal = self._refusal or error

    def refusal(self) -> MgmtnError | None:
        """The first that `refuse` was told."""
        return self._refusal


def start_ledger() -> Any:
    """The actor of a new ledger, on the driver's node."""
    # Hard: softly, Ray may place it on another node, and it would die with that one, its counts with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Ledger)
    return actor.options(scheduling_strategy=here).remote()


class Stage(Protocol):
    """A stage of the flow: rows of whole images in, rows of the same images out."""

    def __call__(self, batch: pa.Table) -> pa.Table: ...

    def give_up(self, batch: pa.Table) -> pa.Table:
        """What becomes of images that cannot be worked on: rows with status `crashed`."""


class Survivor:
    """A stage that outlives the images which kill its process: see `surviving`."""

    stage_class: type

    def __init__(self, arguments: tuple[Any, ...], ledger: Any, task_timeout: float = 0) -> None:
        """
        Args:
            arguments: of the stage's constructor.
            ledger: of the run.
            task_timeout: seconds after which a step of its work counts as hanging; 0: no limit. Its start has none.
        """
        self.ledger = ledger
        with self._refusals_told():
            self.stage: Stage = self.stage_class(*arguments)
        self.task_timeout = task_timeout

    def __call__(self, batch: pa.Table) -> pa.Table:
        if not batch.num_rows:
            return self.stage(batch)
        ids = batch["image_id"]
        work = f"{self.stage_class.__name__} {ids[0]} {batch.num_rows}"
        deaths = ray.get(self.ledger.begin.remote(work))
        if deaths:
            log.warning("event=worker_died work=%r deaths=%d next=image_by_image", work, deaths)
            result = pa.concat_tables(self._alone(rows) for rows in images_of(batch))
        else:
            result = self._watched(batch, work)
        self.ledger.end.remote(work)
        return result

    def _alone(self, rows: pa.Table) -> pa.Table:
        work = f"{self.stage_class.__name__} {rows['image_id'][0]} alone"
        deaths = ray.get(self.ledger.begin.remote(work))
        if deaths >= DEATHS:
            log.error("event=crashed uri=%r deaths=%d", rows["uri"][0].as_py(), deaths)
            return self.stage.give_up(rows)
        result = self._watched(rows, work)
        self.ledger.end.remote(work)
        return result

    def _watched(self, batch: pa.Table, work: str) -> pa.Table:
        with self._refusals_told(), ended_if_it_hangs(work, seconds=self.task_timeout):
            return self.stage(batch)

    @contextmanager
    def _refusals_told(self) -> Iterator[None]:
        try:
            yield
        except (ConfigError, CheckpointError) as error:
            ray.get(self.ledger.refuse.remote(error))
            raise


def surviving(stage: type) -> type[Survivor]:
    """A stage as one that outlives its process, under its own name: Ray names processes and metrics after it."""
    return type(stage.__name__, (Survivor,), {"stage_class": stage})


def images_of(batch: pa.Table) -> Iterator[pa.Table]:
    """The rows of each image, which lie together, in order."""
    runs = pc.run_end_encode(batch["image_id"].combine_chunks())
    start = 0
    for end in runs.run_ends.to_pylist():
        yield batch.slice(start, end - start)
        start = end


@contextmanager
def settings_of_workers(ledger: Any) -> Iterator[None]:
    """Around a flow of `surviving` stages: wrong settings of a worker's end it as those of the driver do.

    Raises:
        ConfigError, CheckpointError: what the worker raised.
    """
    try:
        yield
    except ray.exceptions.RayError as error:  # of a task, or of an actor that could not start
        refusal = ray.get(ledger.refusal.remote())
        if refusal is None:
            raise
        raise refusal from error


@contextmanager
def progress_shown(
    ledger: Any, *, images: int, report: Callable[[Mapping[str, int]], None] = lambda counts: None
) -> Iterator[None]:
    """Show images done, their rate, the time left and the failures so far; `report` is told the same every second."""
    finished = threading.Event()
    with progress_bar("label", total=images, unit="images") as bar:

        def show() -> None:
            counts = ray.get(ledger.outcomes.remote())
            report(counts)
            failed = sum(counts[status] for status in FAILED)
            done = sum(counts[status] for status in Status)
            bar.set(done, f"faces={counts['faces']} no_face={counts[Status.NO_FACE]} failed={failed}")

        def watch() -> None:
            while not finished.wait(1.0):
                show()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            finished.set()
            watcher.join()
        show()
