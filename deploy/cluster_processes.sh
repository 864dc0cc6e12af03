# What the local clusters of Spark and Flink share; their scripts source it. Processes are started, noted and ended here.
# Needs: engine (its name), folder (of the cluster: logs and process ids).

stop() {
    printf "$engine: %s\n" "$@" >&2
    exit 1
}

# start LOG COMMAND...: in the background, as the leader of a process group.
start() {
    log=$1
    shift
    setsid "$@" >>"$folder/$log" 2>&1 </dev/null &
    echo $! >>"$folder/pids"
}

down() {
    [ -f "$folder/pids" ] || return 0
    # Each leads a process group of its own; the last one started goes first.
    tac "$folder/pids" | while read -r pid; do
        # A number of a process that something killed may be another process's by now.
        grep -qsF "$folder" "/proc/$pid/cmdline" && kill -TERM -- "-$pid"
    done || true
    rm -f "$folder/pids"
}
