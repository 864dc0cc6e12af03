"""Search pipelines: protein sequences in, records of the feature store out.

The data's way, by what a file is about:

    queries      fasta -> sequences
    databases    databases (what a build is given) <- registry, manifest, database_files (known by name);
                 staging_source -> staging_copy -> staging (on a local disk)
    tools        search_tool (the contract) <- jackhmmer, hhblits, mmseqs (mmseqs_commands, mmseqs_files;
                 many queries in a run: together), hhsuite_build (makes databases), sharded_jackhmmer
                 (several files, or many queries); subprocess_runner and warden run programs, energy estimates
                 what they draw; tools chooses
    engines      scanner (the contract: jackhmmer's candidates in a file) <- jackhmmer_scanner (scan_names),
                 fast_jackhmmer (scan, scan_memory, scan_choice, scan_kernels; on a CUDA device scan_gpu,
                 cuda_device), pyhmmer_scanner, hmmpgmd_scanner (hmmpgmd); all read by scan_database
    search       plan (units; id_set, kept_plan) -> search (one of them) -> results (kept by content); hits
                 (what one found); unchanged (the database is still the planned one)
    templates    template_tool (the contract) <- hmmsearch, hhsearch; template_profile (what is searched
                 with) -> template_search (one of them); template_database (made of mmCIF files)
    records      msa (merge) -> features (a record) -> parts (into the store)
    a build      build_config -> job -> run -> outcome; forecast, costs, ledger, progress, interrupt
    an array     share (who searches what) -> array_task (one task of an array of jobs)
    on Beam      graph (search_step, template_graph), packing (the costliest first), runners, engine
                 (dataflow, flink: what one engine needs; engine_words), engine_errors; submit (without
                 waiting) <- template (the launcher of Dataflow's flex template)
    commands     cli, database_cli, ledger_cli, search_speed_cli (what a search costs here: search_speed)

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
