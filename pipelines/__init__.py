"""Search pipelines: protein sequences in, records of the feature store out.

The data's way, a room or file each; what a room holds is said by its files' first lines:

    queries      fasta -> sequences (a query, or a dead letter)
    databases    databases.spec (what a build is given) <- databases.registry, manifest (known by name), from
                 databases.files; databases.staging (on a local disk)
    planning     planning.plan (units of search) -> planning.packing (the costliest first), planning.share
                 (who searches what in an array), planning.forecast (what it will cost)
    searching    searches.search (a unit), searches.together (many in one run), searches.template_search
                 -> searches.results (kept by content) -> searches.hits (what one found)
    with         tools.search_tool (the contract) <- tools.jackhmmer, tools.hhblits, tools.mmseqs; of
                 templates tools.template_tool <- tools.hmmsearch, tools.hhsearch; programs runs programs
    engines      tools.scanner (the contract: jackhmmer's candidates in a file) <- tools.jackhmmer_scanner,
                 tools.fast_jackhmmer (fast_scan), tools.pyhmmer_scanner, tools.hmmpgmd_scanner
    records      records.msa (merge) -> records.features (a record) -> records.parts (into the store)
    a build      build_config -> building.job -> building.run -> building.outcome; building.array_task (a
                 task of an array), building.submit (without waiting) <- template (of Dataflow)
    on Beam      beam.graph, beam.runners, beam.engine (beam.dataflow, beam.flink: what one engine needs)
    commands     cli

Importing this package does not import Beam; only a run does.
"""

from foldfeed.pipelines.build_config import BuildConfig, BuildReport
from foldfeed.pipelines.building.job import run_build
from foldfeed.pipelines.databases.spec import DatabaseSpec
from foldfeed.pipelines.errors import PipelineError
from foldfeed.pipelines.sequences import DeadLetter, QuerySequence
from foldfeed.pipelines.tools.search_tool import SearchResult, SearchTool, ToolIdentity

__all__ = [
    "BuildConfig",
    "BuildReport",
    "DatabaseSpec",
    "DeadLetter",
    "PipelineError",
    "QuerySequence",
    "SearchResult",
    "SearchTool",
    "ToolIdentity",
    "run_build",
]
