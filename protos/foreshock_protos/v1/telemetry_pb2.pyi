from google.protobuf import any_pb2 as _any_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RecordFlag(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RECORD_FLAG_NONE: _ClassVar[RecordFlag]
    LOSS_OBSERVED: _ClassVar[RecordFlag]
    INCOMPLETE: _ClassVar[RecordFlag]
    EDITED: _ClassVar[RecordFlag]
    SKIPPED: _ClassVar[RecordFlag]
    LOCAL_NORMS: _ClassVar[RecordFlag]
    SHADOW_CLIPPED: _ClassVar[RecordFlag]
    SHADOW_SKIPPED: _ClassVar[RecordFlag]
    NOT_STEPPED: _ClassVar[RecordFlag]
    GRADIENT_UNKNOWN: _ClassVar[RecordFlag]

class ExitReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXIT_REASON_UNSPECIFIED: _ClassVar[ExitReason]
    FINISHED: _ClassVar[ExitReason]
    DETACHED: _ClassVar[ExitReason]
    EXCEPTION: _ClassVar[ExitReason]
    LOST: _ClassVar[ExitReason]
    INTERRUPTED: _ClassVar[ExitReason]
RECORD_FLAG_NONE: RecordFlag
LOSS_OBSERVED: RecordFlag
INCOMPLETE: RecordFlag
EDITED: RecordFlag
SKIPPED: RecordFlag
LOCAL_NORMS: RecordFlag
SHADOW_CLIPPED: RecordFlag
SHADOW_SKIPPED: RecordFlag
NOT_STEPPED: RecordFlag
GRADIENT_UNKNOWN: RecordFlag
EXIT_REASON_UNSPECIFIED: ExitReason
FINISHED: ExitReason
DETACHED: ExitReason
EXCEPTION: ExitReason
LOST: ExitReason
INTERRUPTED: ExitReason

class FromRecorder(_message.Message):
    __slots__ = ("hello", "steps", "event", "exit", "block")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    EXIT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    steps: StepBatch
    event: Event
    exit: Exit
    block: StepBlock
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., steps: _Optional[_Union[StepBatch, _Mapping]] = ..., event: _Optional[_Union[Event, _Mapping]] = ..., exit: _Optional[_Union[Exit, _Mapping]] = ..., block: _Optional[_Union[StepBlock, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("schema_version", "instance", "experiment", "run", "launch_id", "started_seconds", "topology", "model", "optimizer", "clip", "capabilities", "versions", "pid", "exited", "token")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SCHEMA_VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    LAUNCH_ID_FIELD_NUMBER: _ClassVar[int]
    STARTED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    EXITED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    schema_version: int
    instance: str
    experiment: str
    run: str
    launch_id: str
    started_seconds: float
    topology: Topology
    model: ModelSummary
    optimizer: OptimizerSummary
    clip: str
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    versions: _containers.ScalarMap[str, str]
    pid: int
    exited: bool
    token: str
    def __init__(self, schema_version: _Optional[int] = ..., instance: _Optional[str] = ..., experiment: _Optional[str] = ..., run: _Optional[str] = ..., launch_id: _Optional[str] = ..., started_seconds: _Optional[float] = ..., topology: _Optional[_Union[Topology, _Mapping]] = ..., model: _Optional[_Union[ModelSummary, _Mapping]] = ..., optimizer: _Optional[_Union[OptimizerSummary, _Mapping]] = ..., clip: _Optional[str] = ..., capabilities: _Optional[_Iterable[str]] = ..., versions: _Optional[_Mapping[str, str]] = ..., pid: _Optional[int] = ..., exited: bool = ..., token: _Optional[str] = ...) -> None: ...

class Topology(_message.Message):
    __slots__ = ("rank", "local_rank", "world_size", "node")
    RANK_FIELD_NUMBER: _ClassVar[int]
    LOCAL_RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    local_rank: int
    world_size: int
    node: str
    def __init__(self, rank: _Optional[int] = ..., local_rank: _Optional[int] = ..., world_size: _Optional[int] = ..., node: _Optional[str] = ...) -> None: ...

class ModelSummary(_message.Message):
    __slots__ = ("type", "module_types", "parameters", "parameter_sizes", "layers", "parameter_layers")
    class ModuleTypesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TYPE_FIELD_NUMBER: _ClassVar[int]
    MODULE_TYPES_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_SIZES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_LAYERS_FIELD_NUMBER: _ClassVar[int]
    type: str
    module_types: _containers.ScalarMap[str, int]
    parameters: _containers.RepeatedScalarFieldContainer[str]
    parameter_sizes: _containers.RepeatedScalarFieldContainer[int]
    layers: _containers.RepeatedScalarFieldContainer[str]
    parameter_layers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, type: _Optional[str] = ..., module_types: _Optional[_Mapping[str, int]] = ..., parameters: _Optional[_Iterable[str]] = ..., parameter_sizes: _Optional[_Iterable[int]] = ..., layers: _Optional[_Iterable[str]] = ..., parameter_layers: _Optional[_Iterable[int]] = ...) -> None: ...

class OptimizerSummary(_message.Message):
    __slots__ = ("type", "fused")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    FUSED_FIELD_NUMBER: _ClassVar[int]
    type: str
    fused: bool
    def __init__(self, type: _Optional[str] = ..., fused: bool = ...) -> None: ...

class StepBatch(_message.Message):
    __slots__ = ("instance", "first_sequence", "step", "wall_seconds", "monotonic_seconds", "learning_rate", "flags", "loss", "loss_scale", "global_norm", "clip_coefficient", "local_norm", "global_nan_parameters", "global_inf_parameters", "local_nan_parameters", "local_inf_parameters", "first_nonfinite_global", "first_nonfinite_local", "reduced_sequence", "reduced_square_sum", "reduced_nan_ranks", "reduced_inf_ranks", "reduced_idle_ranks", "reduced_loss_sum", "reduced_loss_count", "reduced_nan_losses", "reduced_inf_losses", "global_layer_norms", "local_layer_norms", "dropped", "parameter_fingerprint", "parameter_norm", "update_ratio", "gradient_absolute_maximum", "backward_passes", "first_moment_norm", "second_moment_norm", "weight_rows", "parameter_layer_norms", "update_layer_ratios", "first_moment_layer_norms", "second_moment_layer_norms")
    class DroppedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WALL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MONOTONIC_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_NORM_FIELD_NUMBER: _ClassVar[int]
    CLIP_COEFFICIENT_FIELD_NUMBER: _ClassVar[int]
    LOCAL_NORM_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_NAN_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_INF_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_NAN_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_INF_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    FIRST_NONFINITE_GLOBAL_FIELD_NUMBER: _ClassVar[int]
    FIRST_NONFINITE_LOCAL_FIELD_NUMBER: _ClassVar[int]
    REDUCED_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    REDUCED_SQUARE_SUM_FIELD_NUMBER: _ClassVar[int]
    REDUCED_NAN_RANKS_FIELD_NUMBER: _ClassVar[int]
    REDUCED_INF_RANKS_FIELD_NUMBER: _ClassVar[int]
    REDUCED_IDLE_RANKS_FIELD_NUMBER: _ClassVar[int]
    REDUCED_LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    REDUCED_LOSS_COUNT_FIELD_NUMBER: _ClassVar[int]
    REDUCED_NAN_LOSSES_FIELD_NUMBER: _ClassVar[int]
    REDUCED_INF_LOSSES_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_LAYER_NORMS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_LAYER_NORMS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_NORM_FIELD_NUMBER: _ClassVar[int]
    UPDATE_RATIO_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_ABSOLUTE_MAXIMUM_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_PASSES_FIELD_NUMBER: _ClassVar[int]
    FIRST_MOMENT_NORM_FIELD_NUMBER: _ClassVar[int]
    SECOND_MOMENT_NORM_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_ROWS_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_LAYER_NORMS_FIELD_NUMBER: _ClassVar[int]
    UPDATE_LAYER_RATIOS_FIELD_NUMBER: _ClassVar[int]
    FIRST_MOMENT_LAYER_NORMS_FIELD_NUMBER: _ClassVar[int]
    SECOND_MOMENT_LAYER_NORMS_FIELD_NUMBER: _ClassVar[int]
    instance: str
    first_sequence: int
    step: _containers.RepeatedScalarFieldContainer[int]
    wall_seconds: _containers.RepeatedScalarFieldContainer[float]
    monotonic_seconds: _containers.RepeatedScalarFieldContainer[float]
    learning_rate: _containers.RepeatedScalarFieldContainer[float]
    flags: _containers.RepeatedScalarFieldContainer[int]
    loss: _containers.RepeatedScalarFieldContainer[float]
    loss_scale: _containers.RepeatedScalarFieldContainer[float]
    global_norm: _containers.RepeatedScalarFieldContainer[float]
    clip_coefficient: _containers.RepeatedScalarFieldContainer[float]
    local_norm: _containers.RepeatedScalarFieldContainer[float]
    global_nan_parameters: _containers.RepeatedScalarFieldContainer[float]
    global_inf_parameters: _containers.RepeatedScalarFieldContainer[float]
    local_nan_parameters: _containers.RepeatedScalarFieldContainer[float]
    local_inf_parameters: _containers.RepeatedScalarFieldContainer[float]
    first_nonfinite_global: _containers.RepeatedScalarFieldContainer[float]
    first_nonfinite_local: _containers.RepeatedScalarFieldContainer[float]
    reduced_sequence: _containers.RepeatedScalarFieldContainer[float]
    reduced_square_sum: _containers.RepeatedScalarFieldContainer[float]
    reduced_nan_ranks: _containers.RepeatedScalarFieldContainer[float]
    reduced_inf_ranks: _containers.RepeatedScalarFieldContainer[float]
    reduced_idle_ranks: _containers.RepeatedScalarFieldContainer[float]
    reduced_loss_sum: _containers.RepeatedScalarFieldContainer[float]
    reduced_loss_count: _containers.RepeatedScalarFieldContainer[float]
    reduced_nan_losses: _containers.RepeatedScalarFieldContainer[float]
    reduced_inf_losses: _containers.RepeatedScalarFieldContainer[float]
    global_layer_norms: _containers.RepeatedScalarFieldContainer[float]
    local_layer_norms: _containers.RepeatedScalarFieldContainer[float]
    dropped: _containers.ScalarMap[str, int]
    parameter_fingerprint: _containers.RepeatedScalarFieldContainer[float]
    parameter_norm: _containers.RepeatedScalarFieldContainer[float]
    update_ratio: _containers.RepeatedScalarFieldContainer[float]
    gradient_absolute_maximum: _containers.RepeatedScalarFieldContainer[float]
    backward_passes: int
    first_moment_norm: _containers.RepeatedScalarFieldContainer[float]
    second_moment_norm: _containers.RepeatedScalarFieldContainer[float]
    weight_rows: _containers.RepeatedScalarFieldContainer[int]
    parameter_layer_norms: _containers.RepeatedScalarFieldContainer[float]
    update_layer_ratios: _containers.RepeatedScalarFieldContainer[float]
    first_moment_layer_norms: _containers.RepeatedScalarFieldContainer[float]
    second_moment_layer_norms: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, instance: _Optional[str] = ..., first_sequence: _Optional[int] = ..., step: _Optional[_Iterable[int]] = ..., wall_seconds: _Optional[_Iterable[float]] = ..., monotonic_seconds: _Optional[_Iterable[float]] = ..., learning_rate: _Optional[_Iterable[float]] = ..., flags: _Optional[_Iterable[int]] = ..., loss: _Optional[_Iterable[float]] = ..., loss_scale: _Optional[_Iterable[float]] = ..., global_norm: _Optional[_Iterable[float]] = ..., clip_coefficient: _Optional[_Iterable[float]] = ..., local_norm: _Optional[_Iterable[float]] = ..., global_nan_parameters: _Optional[_Iterable[float]] = ..., global_inf_parameters: _Optional[_Iterable[float]] = ..., local_nan_parameters: _Optional[_Iterable[float]] = ..., local_inf_parameters: _Optional[_Iterable[float]] = ..., first_nonfinite_global: _Optional[_Iterable[float]] = ..., first_nonfinite_local: _Optional[_Iterable[float]] = ..., reduced_sequence: _Optional[_Iterable[float]] = ..., reduced_square_sum: _Optional[_Iterable[float]] = ..., reduced_nan_ranks: _Optional[_Iterable[float]] = ..., reduced_inf_ranks: _Optional[_Iterable[float]] = ..., reduced_idle_ranks: _Optional[_Iterable[float]] = ..., reduced_loss_sum: _Optional[_Iterable[float]] = ..., reduced_loss_count: _Optional[_Iterable[float]] = ..., reduced_nan_losses: _Optional[_Iterable[float]] = ..., reduced_inf_losses: _Optional[_Iterable[float]] = ..., global_layer_norms: _Optional[_Iterable[float]] = ..., local_layer_norms: _Optional[_Iterable[float]] = ..., dropped: _Optional[_Mapping[str, int]] = ..., parameter_fingerprint: _Optional[_Iterable[float]] = ..., parameter_norm: _Optional[_Iterable[float]] = ..., update_ratio: _Optional[_Iterable[float]] = ..., gradient_absolute_maximum: _Optional[_Iterable[float]] = ..., backward_passes: _Optional[int] = ..., first_moment_norm: _Optional[_Iterable[float]] = ..., second_moment_norm: _Optional[_Iterable[float]] = ..., weight_rows: _Optional[_Iterable[int]] = ..., parameter_layer_norms: _Optional[_Iterable[float]] = ..., update_layer_ratios: _Optional[_Iterable[float]] = ..., first_moment_layer_norms: _Optional[_Iterable[float]] = ..., second_moment_layer_norms: _Optional[_Iterable[float]] = ...) -> None: ...

class StepBlock(_message.Message):
    __slots__ = ("ranks", "first_sequence", "steps", "records", "sums", "global_layer_norms", "weight_rows", "layer_weights")
    class Rank(_message.Message):
        __slots__ = ("instance", "dropped", "backward_passes")
        class DroppedEntry(_message.Message):
            __slots__ = ("key", "value")
            KEY_FIELD_NUMBER: _ClassVar[int]
            VALUE_FIELD_NUMBER: _ClassVar[int]
            key: str
            value: int
            def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
        INSTANCE_FIELD_NUMBER: _ClassVar[int]
        DROPPED_FIELD_NUMBER: _ClassVar[int]
        BACKWARD_PASSES_FIELD_NUMBER: _ClassVar[int]
        instance: str
        dropped: _containers.ScalarMap[str, int]
        backward_passes: int
        def __init__(self, instance: _Optional[str] = ..., dropped: _Optional[_Mapping[str, int]] = ..., backward_passes: _Optional[int] = ...) -> None: ...
    RANKS_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_LAYER_NORMS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_ROWS_FIELD_NUMBER: _ClassVar[int]
    LAYER_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    ranks: _containers.RepeatedCompositeFieldContainer[StepBlock.Rank]
    first_sequence: int
    steps: int
    records: bytes
    sums: bytes
    global_layer_norms: bytes
    weight_rows: _containers.RepeatedScalarFieldContainer[int]
    layer_weights: bytes
    def __init__(self, ranks: _Optional[_Iterable[_Union[StepBlock.Rank, _Mapping]]] = ..., first_sequence: _Optional[int] = ..., steps: _Optional[int] = ..., records: _Optional[bytes] = ..., sums: _Optional[bytes] = ..., global_layer_norms: _Optional[bytes] = ..., weight_rows: _Optional[_Iterable[int]] = ..., layer_weights: _Optional[bytes] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("instance", "kind", "step", "wall_seconds", "detail")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Event.Kind]
        RANK_LOST: _ClassVar[Event.Kind]
        PROBE_ERROR: _ClassVar[Event.Kind]
    KIND_UNSPECIFIED: Event.Kind
    RANK_LOST: Event.Kind
    PROBE_ERROR: Event.Kind
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WALL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    instance: str
    kind: Event.Kind
    step: int
    wall_seconds: float
    detail: str
    def __init__(self, instance: _Optional[str] = ..., kind: _Optional[_Union[Event.Kind, str]] = ..., step: _Optional[int] = ..., wall_seconds: _Optional[float] = ..., detail: _Optional[str] = ...) -> None: ...

class Exit(_message.Message):
    __slots__ = ("instance", "reason", "detail", "last_sequence")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    instance: str
    reason: ExitReason
    detail: str
    last_sequence: int
    def __init__(self, instance: _Optional[str] = ..., reason: _Optional[_Union[ExitReason, str]] = ..., detail: _Optional[str] = ..., last_sequence: _Optional[int] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("epoch", "positions", "flow", "page_url", "schema_version")
    class Position(_message.Message):
        __slots__ = ("instance", "sequence", "closed", "run", "refused", "history", "notice")
        INSTANCE_FIELD_NUMBER: _ClassVar[int]
        SEQUENCE_FIELD_NUMBER: _ClassVar[int]
        CLOSED_FIELD_NUMBER: _ClassVar[int]
        RUN_FIELD_NUMBER: _ClassVar[int]
        REFUSED_FIELD_NUMBER: _ClassVar[int]
        HISTORY_FIELD_NUMBER: _ClassVar[int]
        NOTICE_FIELD_NUMBER: _ClassVar[int]
        instance: str
        sequence: int
        closed: bool
        run: str
        refused: str
        history: NormHistory
        notice: str
        def __init__(self, instance: _Optional[str] = ..., sequence: _Optional[int] = ..., closed: bool = ..., run: _Optional[str] = ..., refused: _Optional[str] = ..., history: _Optional[_Union[NormHistory, _Mapping]] = ..., notice: _Optional[str] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    FLOW_FIELD_NUMBER: _ClassVar[int]
    PAGE_URL_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_VERSION_FIELD_NUMBER: _ClassVar[int]
    epoch: str
    positions: _containers.RepeatedCompositeFieldContainer[Ack.Position]
    flow: FlowControl
    page_url: str
    schema_version: int
    def __init__(self, epoch: _Optional[str] = ..., positions: _Optional[_Iterable[_Union[Ack.Position, _Mapping]]] = ..., flow: _Optional[_Union[FlowControl, _Mapping]] = ..., page_url: _Optional[str] = ..., schema_version: _Optional[int] = ...) -> None: ...

class NormHistory(_message.Message):
    __slots__ = ("mean", "recent", "deviation", "count", "learning_rate")
    MEAN_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    DEVIATION_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    mean: float
    recent: float
    deviation: float
    count: int
    learning_rate: float
    def __init__(self, mean: _Optional[float] = ..., recent: _Optional[float] = ..., deviation: _Optional[float] = ..., count: _Optional[int] = ..., learning_rate: _Optional[float] = ...) -> None: ...

class FlowControl(_message.Message):
    __slots__ = ("flush_interval_seconds", "max_batch_steps")
    FLUSH_INTERVAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_STEPS_FIELD_NUMBER: _ClassVar[int]
    flush_interval_seconds: float
    max_batch_steps: int
    def __init__(self, flush_interval_seconds: _Optional[float] = ..., max_batch_steps: _Optional[int] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("code", "message", "details")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    details: _containers.RepeatedCompositeFieldContainer[_any_pb2.Any]
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., details: _Optional[_Iterable[_Union[_any_pb2.Any, _Mapping]]] = ...) -> None: ...

class RetryInfo(_message.Message):
    __slots__ = ("retry_delay",)
    RETRY_DELAY_FIELD_NUMBER: _ClassVar[int]
    retry_delay: _duration_pb2.Duration
    def __init__(self, retry_delay: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...
