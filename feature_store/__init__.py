"""The feature store: one format for protein alignments, random access to crops, SQL over the records.

Imports nothing of the other rooms. Needs neither Beam nor torch.

Names are imported on first use, so that a program which needs one of them does not wait for DuckDB, Arrow's
data sets and Delta's library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from foldfeed.feature_store.lazy_names import lazy_names

if TYPE_CHECKING:
    from foldfeed.feature_store.errors import (
        AlignmentParseError,
        CommitConflictError,
        CommitContentionError,
        CorruptDataError,
        FoldfeedError,
        ForkedProcessError,
        FormatVersionError,
        HistoryChangedError,
        InvalidRecordError,
        LeakageError,
        MissingExtraError,
        NameNotFoundError,
        NameTakenError,
        NotAStoreError,
        QueryError,
        QueryTimeoutError,
        RecordNotFoundError,
        RecordSetMismatchError,
        SplitError,
        StorageError,
        StorageFullError,
        StorageRefusedError,
        StoreError,
        StoreGoneError,
        StoreSettingsError,
        StoreUrlError,
        StructureParseError,
        TagError,
    )
    from foldfeed.feature_store.exporters.formats import ExportOptions, export_record
    from foldfeed.feature_store.format.effective_rows import EffectiveRows, measure_effective_rows
    from foldfeed.feature_store.format.grid import StoredRun
    from foldfeed.feature_store.format.record import DatabaseUse, MsaRecord, RowProvenance
    from foldfeed.feature_store.format.settings import StoreSettings
    from foldfeed.feature_store.format.structure import Structure
    from foldfeed.feature_store.format.templates import TemplateHit, Templates
    from foldfeed.feature_store.importers.attach_structures import AttachOptions, attach_structures
    from foldfeed.feature_store.importers.into_store import import_into
    from foldfeed.feature_store.importers.layouts import AlignmentImport
    from foldfeed.feature_store.importers.rows import ImportOptions
    from foldfeed.feature_store.index.log import LogEntry
    from foldfeed.feature_store.index.transactions import CommitResult
    from foldfeed.feature_store.parsers.mmcif.entry import MmcifChain, MmcifEntry, load_mmcif, read_mmcif
    from foldfeed.feature_store.parts.many_crops import CropRequest
    from foldfeed.feature_store.parts.reader import RecordRead
    from foldfeed.feature_store.parts.record import Record
    from foldfeed.feature_store.parts.tiles import Crop, CropPlan, Slab
    from foldfeed.feature_store.parts.writer import WrittenPart, write_part
    from foldfeed.feature_store.store.feature_store import FeatureStore
    from foldfeed.feature_store.store.questions import RecordSource, StoreView
    from foldfeed.feature_store.store.record_sets import RecordSet
    from foldfeed.feature_store.store.splits import Split
    from foldfeed.feature_store.store.version_diff import VersionDiff

_HOMES = {
    "AlignmentImport": "importers.layouts",
    "AlignmentParseError": "errors",
    "AttachOptions": "importers.attach_structures",
    "CommitConflictError": "errors",
    "CommitContentionError": "errors",
    "CommitResult": "index.transactions",
    "CorruptDataError": "errors",
    "Crop": "parts.tiles",
    "CropPlan": "parts.tiles",
    "CropRequest": "parts.many_crops",
    "DatabaseUse": "format.record",
    "EffectiveRows": "format.effective_rows",
    "ExportOptions": "exporters.formats",
    "FeatureStore": "store.feature_store",
    "FoldfeedError": "errors",
    "ForkedProcessError": "errors",
    "FormatVersionError": "errors",
    "HistoryChangedError": "errors",
    "ImportOptions": "importers.rows",
    "InvalidRecordError": "errors",
    "LeakageError": "errors",
    "LogEntry": "index.log",
    "MissingExtraError": "errors",
    "MmcifChain": "parsers.mmcif.entry",
    "MmcifEntry": "parsers.mmcif.entry",
    "MsaRecord": "format.record",
    "NameNotFoundError": "errors",
    "NameTakenError": "errors",
    "NotAStoreError": "errors",
    "QueryError": "errors",
    "QueryTimeoutError": "errors",
    "Record": "parts.record",
    "RecordRead": "parts.reader",
    "RecordNotFoundError": "errors",
    "RecordSet": "store.record_sets",
    "RecordSetMismatchError": "errors",
    "RecordSource": "store.questions",
    "RowProvenance": "format.record",
    "Slab": "parts.tiles",
    "Split": "store.splits",
    "SplitError": "errors",
    "StorageError": "errors",
    "StorageFullError": "errors",
    "StorageRefusedError": "errors",
    "StoreError": "errors",
    "StoreGoneError": "errors",
    "StoreSettings": "format.settings",
    "StoreSettingsError": "errors",
    "StoreUrlError": "errors",
    "StoreView": "store.questions",
    "StoredRun": "format.grid",
    "Structure": "format.structure",
    "StructureParseError": "errors",
    "TagError": "errors",
    "TemplateHit": "format.templates",
    "Templates": "format.templates",
    "VersionDiff": "store.version_diff",
    "WrittenPart": "parts.writer",
    "attach_structures": "importers.attach_structures",
    "export_record": "exporters.formats",
    "import_into": "importers.into_store",
    "load_mmcif": "parsers.mmcif.entry",
    "measure_effective_rows": "format.effective_rows",
    "read_mmcif": "parsers.mmcif.entry",
    "write_part": "parts.writer",
}

__all__ = [
    "AlignmentImport",
    "AlignmentParseError",
    "AttachOptions",
    "CommitConflictError",
    "CommitContentionError",
    "CommitResult",
    "CorruptDataError",
    "Crop",
    "CropPlan",
    "CropRequest",
    "DatabaseUse",
    "EffectiveRows",
    "ExportOptions",
    "FeatureStore",
    "FoldfeedError",
    "ForkedProcessError",
    "FormatVersionError",
    "HistoryChangedError",
    "ImportOptions",
    "InvalidRecordError",
    "LeakageError",
    "LogEntry",
    "MissingExtraError",
    "MmcifChain",
    "MmcifEntry",
    "MsaRecord",
    "NameNotFoundError",
    "NameTakenError",
    "NotAStoreError",
    "QueryError",
    "QueryTimeoutError",
    "Record",
    "RecordNotFoundError",
    "RecordRead",
    "RecordSet",
    "RecordSetMismatchError",
    "RecordSource",
    "RowProvenance",
    "Slab",
    "Split",
    "SplitError",
    "StorageError",
    "StorageFullError",
    "StorageRefusedError",
    "StoreError",
    "StoreGoneError",
    "StoreSettings",
    "StoreSettingsError",
    "StoreUrlError",
    "StoreView",
    "StoredRun",
    "Structure",
    "StructureParseError",
    "TagError",
    "TemplateHit",
    "Templates",
    "VersionDiff",
    "WrittenPart",
    "attach_structures",
    "export_record",
    "import_into",
    "load_mmcif",
    "measure_effective_rows",
    "read_mmcif",
    "write_part",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
