"""The labelling flow, in one expression: uris -> images -> faces and landmarks -> masks -> model -> table."""

from typing import Any, Final

import pyarrow as pa
import ray
import ray.data

from jobs.cluster import Pools
from jobs.data.ledger import start_ledger, surviving
from jobs.data.stages import FaceWork, FindFaces, PredictAttributes
from mgmtn.checkpoint import Checkpoint

STANDSTILL_SECONDS: Final = 1800  # Ray's own default: time for a lost node to come back


def label_flow(
    due: pa.Table,
    *,
    work: FaceWork,
    checkpoint: "ray.ObjectRef[Checkpoint]",
    pools: Pools,
    batch_size: int,
    images_per_block: int,
    task_timeout: float = 0,
    progress: Any = None,
    ledger: Any = None,
) -> ray.data.Dataset:
    """Images that are due -> rows of the label table.

    Only aligned faces (uint8, about 50 KB each) and packed masks (4 KB) travel between processes. Ray hands whole
    blocks to a task and joins what a task returns, so the faces of an image stay together. A worker that dies is
    replaced, and its block is worked on again (see `jobs.data.ledger`); so is one that hangs.

    Args:
        due: the plan's rows; at least one. They are cut by count: a block of a table is otherwise cut by its bytes,
            and a night's plan of a few megabytes would be one task.
        task_timeout: seconds after which a step of a worker's work counts as hanging; 0: no limit.
        checkpoint: in the object store, so that each node fetches it once.
        progress: an actor with `add(counts)`.
        ledger: the run's, from `start_ledger`; one of its own if there is none.
    """
    context = ray.data.DataContext.get_current()
    # Ray cuts a block above 128 MB by rows: a picture of a crowd would lose some of its faces to another block.
    context.target_max_block_size = None
    # A worker may also die while it starts, with its node; one that never starts still ends the job.
    context.max_consecutive_actor_init_deaths = 3
    # A block of which n images hang moves on after 1 + 2n of their timeouts; Ray ends a flow that stands still.
    context.execution_no_progress_timeout_s = max(STANDSTILL_SECONDS, 10 * task_timeout)
    ledger = ledger or start_ledger()
    blocks = -(-due.num_rows // images_per_block)
    return (
        ray.data.from_arrow(due, override_num_blocks=blocks)
        .map_batches(
            surviving(FindFaces),
            fn_constructor_args=((work,), ledger, task_timeout),
            batch_format="pyarrow",
            num_cpus=pools.cpus_per_face,
            compute=ray.data.ActorPoolStrategy(size=pools.face_workers),
        )
        .map_batches(
            surviving(PredictAttributes),
            fn_constructor_args=((checkpoint, batch_size, progress), ledger, task_timeout),
            batch_size=batch_size,  # Ray also gathers blocks up to it: a larger one would starve the model
            batch_format="pyarrow",
            num_cpus=pools.cpus_per_model,
            num_gpus=pools.gpus_per_model,
            compute=ray.data.ActorPoolStrategy(size=pools.model_workers),
        )
    )
