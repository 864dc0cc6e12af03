"""Which class runs which tool, and the preparation of a build's databases on the submitter.

Owns the one place where a tool's name becomes an object: to add a tool, add it here and to
`databases.spec.TOOLS`. Does not own what the tools do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from foldfeed.feature_store.format.templates import to_date
from foldfeed.feature_store.storage import Blobs, open_blobs
from foldfeed.pipelines.build_config import BuildConfig, Engine
from foldfeed.pipelines.databases.spec import DatabaseSpec, database_digest, in_merge_order, shard_digests
from foldfeed.pipelines.errors import ConfigError, DatabaseError
from foldfeed.pipelines.tools import hhsearch, jackhmmer
from foldfeed.pipelines.tools.fast_jackhmmer import FastJackhmmer, FastScanner
from foldfeed.pipelines.tools.hhblits import Hhblits
from foldfeed.pipelines.tools.hhsearch import Hhsearch
from foldfeed.pipelines.tools.hmmpgmd_scanner import HmmpgmdScanner
from foldfeed.pipelines.tools.hmmsearch import Hmmsearch
from foldfeed.pipelines.tools.jackhmmer import Jackhmmer
from foldfeed.pipelines.tools.jackhmmer_scanner import JackhmmerScanner
from foldfeed.pipelines.tools.mmseqs import Mmseqs
from foldfeed.pipelines.tools.mmseqs_files import NAME as MMSEQS
from foldfeed.pipelines.tools.mmseqs_files import has_clusters
from foldfeed.pipelines.tools.pyhmmer_scanner import PyhmmerScanner
from foldfeed.pipelines.tools.scanner import Scanner
from foldfeed.pipelines.tools.search_tool import SearchedDatabase, SearchTool, Shard
from foldfeed.pipelines.tools.sharded_jackhmmer import ShardedJackhmmer
from foldfeed.pipelines.tools.template_tool import TemplateDatabase

# Engines that are used as for a database of several files also where it is one: they gain by many queries.
TAKE_MANY = ("pyhmmer", "hmmpgmd")


def find_tool(
    spec: DatabaseSpec,
    *,
    cpus: int,
    timeout_s: float,
    engine: Engine = "binary",
    digests: Blobs | None = None,
    first: SearchedDatabase | None = None,
) -> SearchTool:
    """Returns the tool that searches a database.

    Args:
      spec: the database.
      cpus: threads of one search.
      timeout_s: longest wall time of one search.
      engine: of jackhmmer; the others have one only.
      digests: where content hashes are remembered.
      first: the database that this one is searched after, with mmseqs2.
    Raises:
      ToolNotFoundError: it is not installed here.
      MissingExtraError: the engine needs a package that is not installed.
    """
    if spec.tool == jackhmmer.NAME and (len(spec.paths) > 1 or engine in TAKE_MANY):
        shards = tuple(
            Shard(path=path, digest=digest)
            for path, digest in zip(spec.paths, shard_digests(spec, digests), strict=True)
        )
        return find_sharded(shards, cpus=cpus, timeout_s=timeout_s, engine=engine)
    if spec.tool == jackhmmer.NAME and engine == "fast":
        return FastJackhmmer.find(database=spec.paths[0], cpus=cpus, timeout_s=timeout_s)
    if spec.tool == jackhmmer.NAME:
        return Jackhmmer.find(database=spec.paths[0], cpus=cpus, timeout_s=timeout_s)
    if spec.tool == MMSEQS:
        return Mmseqs.find(
            database=spec.paths[0],
            timeout_s=timeout_s,
            options=spec.options,
            cpus=cpus,
            first=first.tool if first is not None and isinstance(first.tool, Mmseqs) else None,
            first_digest=first.digest if first is not None else "",
        )
    return Hhblits.find(databases=spec.paths, cpus=cpus, timeout_s=timeout_s)


def find_sharded(
    shards: tuple[Shard, ...], *, cpus: int, timeout_s: float, engine: Engine
) -> ShardedJackhmmer:
    """Returns a jackhmmer for a database of some files.

    Raises:
      ToolNotFoundError, MissingExtraError, KernelError, DeviceError: of the engine, as of `find_scanner`.
    """
    plain = Jackhmmer.find(database="", cpus=cpus, timeout_s=timeout_s)
    return ShardedJackhmmer.of(plain, shards, find_scanner(plain, engine))


def find_scanner(plain: Jackhmmer, engine: Engine) -> Scanner:
    """Returns what finds jackhmmer's candidates in one file.

    Raises:
      ToolNotFoundError: the engine needs a program or compiled code that is not here.
      MissingExtraError: it needs a package that is not installed.
      KernelError, DeviceError: as of `FastJackhmmer.find`.
    """
    if engine == "fast":
        return FastScanner(tool=FastJackhmmer.find(database="", cpus=plain.cpus, timeout_s=plain.timeout_s))
    if engine == "pyhmmer":
        return PyhmmerScanner.find(cpus=plain.cpus, timeout_s=plain.timeout_s)
    if engine == "hmmpgmd":
        return HmmpgmdScanner.find(cpus=plain.cpus, timeout_s=plain.timeout_s)
    return JackhmmerScanner(binary=plain.binary, cpus=plain.cpus, timeout_s=plain.timeout_s)


def other_engine_of(tool: SearchTool) -> str | None:
    """Returns in words what searches where it is more than the tool alone, else None."""
    words = [f"{tool.identity.name} {tool.identity.version}"]
    scan = tool.describe_scan() if isinstance(tool, FastJackhmmer) else None
    if isinstance(tool, ShardedJackhmmer):
        scan = tool.scanner.describe([shard.path for shard in tool.shards])
    if scan is not None:
        words.append(f"behind {scan}")
    if isinstance(tool, ShardedJackhmmer) and len(tool.shards) > 1:
        words.append(f"in {len(tool.shards)} shards")
    if isinstance(tool, Mmseqs) and tool.kind.startswith("clusters"):
        words.append("with the members of clusters")
    if isinstance(tool, Mmseqs) and tool.first is not None:
        words.append(f"after {tool.options.after}")
    return " ".join(words) if len(words) > 1 else None


def prepare_templates(config: BuildConfig, databases: Sequence[SearchedDatabase]) -> TemplateDatabase:
    """Returns the templates of a build with their tool and digest.

    Args:
      config: of a build with templates.
      databases: of the build, in merge order.
    Raises:
      DatabaseError, ToolNotFoundError: the files or the tool are not there.
    """
    spec = config.templates
    assert spec is not None
    names = [database.name for database in databases]
    msa = range(len(names)) if config.template_msa is None else [names.index(config.template_msa)]
    database, dates = spec.paths
    return TemplateDatabase(
        name=spec.name,
        digest=database_digest(spec, open_blobs(config.results_url), check=config.check_databases),
        tool=(Hhsearch if spec.tool == hhsearch.NAME else Hmmsearch).find(
            database=database, dates=dates, cpus=config.cpus_per_search, timeout_s=config.timeout_s
        ),
        files=spec.files(),
        msa=tuple(msa),
        msa_name=config.template_msa or "all",
        max_hits=config.max_template_hits,
        max_date=None if config.max_template_date is None else to_date(config.max_template_date),
    )


def prepare_databases(
    specs: Sequence[DatabaseSpec],
    *,
    max_hits: Mapping[str, int],
    cpus: int,
    timeout_s: float,
    digests: Blobs | None,
    engine: Engine = "binary",
    check: bool = False,
) -> tuple[SearchedDatabase, ...]:
    """Returns the databases of a build in merge order, each with its tool and digest.

    Args:
      specs: as the user gave them.
      max_hits: caps by name that replace AlphaFold 2's.
      cpus: threads of one search.
      timeout_s: longest wall time of one search.
      digests: where content hashes are remembered, see `database_digest`.
      engine: of jackhmmer.
      check: read the files although their hashes are remembered.
    Raises:
      DatabaseError, ToolNotFoundError: a database or its tool is not there.
      ConfigError: two names for the same files.
    """
    ordered = in_merge_order(specs)
    for spec in ordered:
        spec.files()
    _check_after(ordered)
    # All are looked for before any is read, which may take long.
    for spec in ordered:
        if spec.tool == jackhmmer.NAME:
            find_scanner(Jackhmmer.find(database="", cpus=cpus, timeout_s=timeout_s), engine)
        else:
            first_file = dataclasses.replace(spec, paths=spec.paths[:1])
            find_tool(first_file, cpus=cpus, timeout_s=timeout_s)
    ready: dict[str, SearchedDatabase] = {}
    # What others are searched after comes first.
    for spec in sorted(ordered, key=lambda spec: bool(spec.options.after)):
        digest = database_digest(spec, digests, check=check)
        earlier = ready.get(spec.options.after)
        ready[spec.name] = SearchedDatabase(
            name=spec.name,
            digest=digest,
            tool=find_tool(
                spec, cpus=cpus, timeout_s=timeout_s, engine=engine, digests=digests, first=earlier
            ),
            max_hits=max_hits.get(spec.name, spec.default_max_hits),
            files=spec.files(),
            after=spec.options.after,
        )
    found = tuple(ready[spec.name] for spec in ordered)
    known: dict[tuple[str, str], str] = {}
    for database in found:
        first = known.setdefault((database.digest, database.tool.identity.digest), database.name)
        if first != database.name:
            raise ConfigError(
                f"databases {first!r} and {database.name!r} are the same files; leave one out, its rows "
                "would only repeat those of the other"
            )
    return found


def _check_after(specs: Sequence[DatabaseSpec]) -> None:
    """Returns if every database that is searched after another one can be.

    Raises:
      ConfigError: there is no such one, or it has no profile to give.
      DatabaseError: one of the two is no database of clusters.
    """
    by_name = {spec.name: spec for spec in specs}
    for spec in specs:
        after = spec.options.after
        if not after:
            continue
        first = by_name.get(after)
        if first is None:
            raise ConfigError(
                f"database {spec.name!r} is to be searched after {after!r}, which is no database of this "
                f"build ({', '.join(by_name)})"
            )
        if first.tool != MMSEQS or first.options.after:
            why = f"after {first.options.after!r}" if first.options.after else f"by {first.tool}"
            raise ConfigError(
                f"database {spec.name!r} is to be searched after {after!r}, which is searched {why}; it "
                f"must be a database of {MMSEQS} that is searched with the query"
            )
        for one in (first, spec):
            if not has_clusters(one.paths[0]):
                raise DatabaseError(
                    one.name,
                    one.paths[0],
                    f"it is no database of clusters (DB_seq, DB_aln), which {MMSEQS} needs of both where "
                    f"{spec.name!r} is searched after {after!r}",
                )
