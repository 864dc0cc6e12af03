#!/usr/bin/env bash
# A real Flink 1.19 on this machine: a JobManager and two TaskManagers of one slot each, on loopback and without
# containers. For trying a build on Flink. Needs Java 17 and Maven; the first start downloads Beam's runner with Flink
# itself, 152 MB.
#
#   deploy/flink/local_cluster.sh up FOLDER PYTHON    PYTHON: of an environment with foldfeed[pipelines]
#   deploy/flink/local_cluster.sh down FOLDER
#
# Logs and process ids lie in FOLDER; FOLDER/boot.sh is what the TaskManagers start. Ports: 6193, 8191.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
usage="usage: local_cluster.sh up|down FOLDER [PYTHON]"
what=${1:?$usage}
mkdir -p "${2:?$usage}"
folder=$(cd "$2" && pwd)

engine=flink
# shellcheck source=../cluster_processes.sh
. "$here/../cluster_processes.sh"

if [ "$what" = down ]; then
    down
    exit 0
fi
[ "$what" = up ] || stop "unknown command $what; up or down"
python=${3:?$usage}
command -v java >/dev/null || stop "Java is not installed; Flink 1.19 needs Java 11 or 17"
[ -f "$folder/pids" ] && stop "$folder already has a cluster; local_cluster.sh down $folder ends it"
for port in 6193 8191; do
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && stop "port $port is in use; is there a Flink already?"
done
if [ ! -e "$folder/jars/.complete" ]; then
    command -v mvn >/dev/null || stop "Maven is not installed; it fetches Beam's runner for Flink"
    rm -rf "$folder/jars"
    mvn -q -B -f "$here/pom.xml" dependency:copy-dependencies -DoutputDirectory="$folder/jars" ||
        stop "Beam's runner for Flink could not be fetched"
    touch "$folder/jars/.complete"
fi
# What Flink's own scripts open of Java 17.
opens=()
for package in java.lang java.lang.reflect java.net java.io java.nio java.text java.time java.util \
    java.util.concurrent java.util.concurrent.atomic java.util.concurrent.locks sun.nio.ch sun.net.util; do
    opens+=("--add-opens=java.base/$package=ALL-UNNAMED")
done
# Beam starts its job server as `java -jar ONE_JAR`; Maven gives many. This one names them, and what it opens of Java.
"$python" - "$folder" "${opens[@]}" <<'PY'
import pathlib, sys, zipfile

folder = pathlib.Path(sys.argv[1])
jars = sorted((folder / "jars").glob("*.jar"))
lines = ["Manifest-Version: 1.0", "Main-Class: org.apache.beam.runners.flink.FlinkJobServerDriver"]
lines += ["Class-Path: " + " ".join(f"jars/{jar.name}" for jar in jars)]
lines += ["Add-Opens: " + " ".join(word.removeprefix("--add-opens=").removesuffix("=ALL-UNNAMED") for word in sys.argv[2:])]
# Lines of a manifest have 72 bytes at most; what goes on begins with a space.
wrapped = [line[:70] + "".join(f"\r\n {line[at : at + 69]}" for at in range(70, len(line), 69)) for line in lines]
with zipfile.ZipFile(folder / "job-server.jar", "w") as jar:
    jar.writestr("META-INF/MANIFEST.MF", "\r\n".join(wrapped) + "\r\n\r\n")
PY
printf '#!/bin/sh\nexec "%s" "%s/../spark/boot.py" "$@"\n' "$python" "$here" >"$folder/boot.sh"
chmod +x "$folder/boot.sh"
mkdir -p "$folder/conf"
cat >"$folder/conf/config.yaml" <<CONF
jobmanager:
  rpc:
    address: 127.0.0.1
    port: 6193
  bind-host: 127.0.0.1
  memory:
    process:
      size: 1000m
taskmanager:
  host: 127.0.0.1
  bind-host: 127.0.0.1
  numberOfTaskSlots: 1
rest:
  address: 127.0.0.1
  bind-address: 127.0.0.1
  port: 8191
classloader:
  # Beam's classes are on the class path of every process here.
  resolve-order: parent-first
io:
  tmp:
    dirs: $folder/tmp
CONF
mkdir -p "$folder/tmp"

rm -f "$folder"/*.log
export FLINK_CONF_DIR="$folder/conf"
flink=(java "${opens[@]}" -cp "$folder/jars/*")
start jobmanager.log "${flink[@]}" -Xmx512m org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint \
    --configDir "$folder/conf"
for number in 1 2; do
    # Sizes that Flink's scripts would compute from the process size.
    start "taskmanager$number.log" "${flink[@]}" -Xmx512m org.apache.flink.runtime.taskexecutor.TaskManagerRunner \
        --configDir "$folder/conf" -D "taskmanager.resource-id=worker$number" \
        -D taskmanager.cpu.cores=1.0 -D taskmanager.memory.task.heap.size=256m \
        -D taskmanager.memory.task.off-heap.size=0 -D taskmanager.memory.managed.size=256m \
        -D taskmanager.memory.network.min=64m -D taskmanager.memory.network.max=64m \
        -D taskmanager.memory.framework.heap.size=128m -D taskmanager.memory.framework.off-heap.size=128m \
        -D taskmanager.memory.jvm-metaspace.size=256m -D taskmanager.memory.jvm-overhead.min=128m \
        -D taskmanager.memory.jvm-overhead.max=128m
done
workers() {
    "$python" -c 'import json, sys, urllib.request as r; print(json.load(r.urlopen(sys.argv[1]))["taskmanagers"])' \
        http://127.0.0.1:8191/overview 2>/dev/null || echo 0
}

for _ in $(seq 90); do
    if [ "$(workers)" = 2 ]; then
        printf 'flink: ready; foldfeed build ... --workers 2 --runner flink -- %s %s\n' \
            "--flink_master=127.0.0.1:8191 --flink_job_server_jar=$folder/job-server.jar --environment_type=PROCESS" \
            "'--environment_config={\"command\":\"$folder/boot.sh\"}'"
        exit 0
    fi
    sleep 1
done
down
stop "it did not come up in 90 s; see $folder/*.log"
