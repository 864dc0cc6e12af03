"""Search pipelines: protein sequences in, records of the feature store out.

Importing this package does not import Beam; only a run does.
"""

from foldfeed.pipelines.build_config import BuildConfig, BuildReport
from foldfeed.pipelines.databases import DatabaseSpec
from foldfeed.pipelines.errors import PipelineError
from foldfeed.pipelines.job import run_build
from foldfeed.pipelines.search_tool import SearchResult, SearchTool, ToolIdentity
from foldfeed.pipelines.sequences import DeadLetter, QuerySequence

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
