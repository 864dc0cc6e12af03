"""Handing a build to an engine without waiting for it: what the launcher of a Dataflow template does.

Owns the steps up to the submission and what is told of it. Does not own the graph
(`beam.graph`) or the commit: nobody waits for the engine here, so nothing is committed. When
the engine is done, the same build without it (``foldfeed build``, embedded) finds every search done, searches
nothing and commits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from foldfeed.feature_store.storage import open_blobs
from foldfeed.pipelines.beam.runners import choose_runner
from foldfeed.pipelines.build_config import BuildConfig
from foldfeed.pipelines.building.job import planned
from foldfeed.pipelines.building.progress import count_done
from foldfeed.pipelines.building.run import beam_options, context_of, graph_of, refuse_foreign_store
from foldfeed.pipelines.fasta import open_query_file
from foldfeed.pipelines.programs.subprocess_runner import allow_all, drive_build


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Submitted:
    """A build that an engine has.

    Attributes:
      store: URL of the feature store, which exists now.
      results: URL of the result store.
      job_id: of the build; names its folder in the result store.
      engine_job: the engine's own name for it, "" where it gives none (a template).
      num_queries: records that will be built.
      num_rejects: entries that cannot be.
      num_planned: searches of the build.
      num_missing: of these, without an answer yet.
    """

    store: str
    results: str
    job_id: str
    engine_job: str
    num_queries: int
    num_rejects: int
    num_planned: int
    num_missing: int


def submit_build(config: BuildConfig) -> Submitted:
    """Plans a build, hands its graph to the engine and returns at once.

    Raises:
      EngineError: the runner or an option is refused.
      PipelineError: a database or tool is not there, or the engine did not take the graph.
      NotAStoreError: the store's folder holds something else.
    """
    allow_all()
    drive_build()
    runner, _ = choose_runner(config.runner)
    options = beam_options(config, runner)
    for url in config.queries:
        open_query_file(url).close()
    refuse_foreign_store(config)
    databases, plan, job_id, num_parts = planned(config)
    context = context_of(config, databases, plan, job_id, num_parts)
    done, _ = count_done(plan, context)
    from foldfeed.pipelines.beam.engine import quiet_beam, start_pipeline

    with quiet_beam():
        engine_job = start_pipeline(options, graph_of(config, context, runner))
    return Submitted(
        store=context.store_url,
        results=open_blobs(config.results_url).url,
        job_id=job_id,
        engine_job=engine_job,
        num_queries=plan.num_queries,
        num_rejects=plan.coverage.count - plan.num_queries,
        num_planned=len(plan.unit_ids),
        num_missing=len(plan.unit_ids) - done,
    )


def lines_of(submitted: Submitted) -> Iterator[str]:
    """Yields lines for a person."""
    yield (
        f"{submitted.store}: {submitted.num_queries} records, {submitted.num_rejects} entries that cannot be "
        f"built; {submitted.num_missing} of {submitted.num_planned} searches to do"
    )
    yield f"handed over as job {submitted.engine_job or submitted.job_id}; results go to {submitted.results}"
    yield "when it is done, the same build without a runner commits (foldfeed build ... --store ...)"
