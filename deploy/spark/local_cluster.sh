#!/usr/bin/env bash
# A real Spark 3.5.0 on this machine: a master, two workers of one core each, and Beam's job server, all on loopback and
# without containers. For trying a build on Spark and for `make test-spark`. Needs Java 17 and Maven; the first start
# downloads Spark (from PyPI) and Beam's runner, about 700 MB.
#
#   deploy/spark/local_cluster.sh up FOLDER PYTHON    PYTHON: of an environment with foldfeed[pipelines]
#   deploy/spark/local_cluster.sh fetch FOLDER PYTHON     downloads only; fails, with the reason, where `up` would
#   deploy/spark/local_cluster.sh down FOLDER
#   deploy/spark/local_cluster.sh worker FOLDER NUMBER    starts worker 1 or 2 again, which something killed
#
# Logs and process ids lie in FOLDER; FOLDER/boot.sh is what the workers start. Ports: 7077, 8080 to 8082, 8097 to 8099.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
usage="usage: local_cluster.sh up|fetch FOLDER PYTHON | down FOLDER | worker FOLDER NUMBER"
what=${1:?$usage}
mkdir -p "${2:?$usage}"
folder=$(cd "$2" && pwd)

engine=spark
# shellcheck source=../cluster_processes.sh
. "$here/../cluster_processes.sh"

start_worker() {
    start "worker$1.log" "$SPARK_HOME/bin/spark-class" org.apache.spark.deploy.worker.Worker \
        --host 127.0.0.1 -c 1 -m 1500m -d "$folder/work$1" --webui-port "808$1" spark://127.0.0.1:7077
}

know_spark() {
    SPARK_HOME=$("$folder/spark/bin/python" -c 'import os, pyspark; print(os.path.dirname(pyspark.__file__))')
    export SPARK_HOME SPARK_LOCAL_IP=127.0.0.1 SPARK_DAEMON_MEMORY=256m
}

if [ "$what" = down ]; then
    down
    exit 0
fi
if [ "$what" = worker ]; then
    [ -f "$folder/pids" ] || stop "$folder has no cluster; local_cluster.sh up starts one"
    know_spark
    start_worker "${3:?$usage}"
    exit 0
fi
[ "$what" = up ] || [ "$what" = fetch ] || stop "unknown command $what; $usage"
python=${3:?$usage}
command -v java >/dev/null || stop "Java is not installed; Spark needs Java 17"
version=$(java -version 2>&1 | sed -n '1s/.*version "\([0-9]*\).*/\1/p')
[ "${version:-0}" -eq 17 ] || stop "Java is version ${version:-unknown}; Spark 3.5.0 needs Java 17"
[ -f "$folder/pids" ] && stop "$folder already has a cluster; local_cluster.sh down $folder ends it"
for port in 7077 8080 8099; do
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && stop "port $port is in use; is there a Spark already?"
done

# Named after what was asked for, so that another pom.xml is fetched anew.
complete="$folder/jars/.complete-$(cksum <"$here/pom.xml" | cut -d' ' -f1)"
if [ ! -e "$complete" ]; then
    command -v mvn >/dev/null || stop "Maven is not installed; it fetches Beam's runner for Spark"
    rm -rf "$folder/jars"
    mvn -q -B -f "$here/pom.xml" dependency:copy-dependencies -DoutputDirectory="$folder/jars" ||
        stop "Beam's runner for Spark could not be fetched"
    touch "$complete"
fi
if [ ! -e "$folder/spark/.complete" ]; then
    "$python" -m venv --clear "$folder/spark"
    "$folder/spark/bin/pip" install -q --disable-pip-version-check pyspark==3.5.0 || stop "Spark could not be fetched"
    touch "$folder/spark/.complete"
fi
[ "$what" = fetch ] && exit 0
know_spark
printf '#!/bin/sh\nexec "%s" "%s/boot.py" "$@"\n' "$python" "$here" >"$folder/boot.sh"
chmod +x "$folder/boot.sh"

rm -f "$folder"/*.log
start master.log "$SPARK_HOME/bin/spark-class" org.apache.spark.deploy.master.Master \
    --host 127.0.0.1 --port 7077 --webui-port 8080
start_worker 1
start_worker 2
# What Spark's own scripts open of Java 17.
opens=()
for package in java.lang java.nio java.util sun.nio.ch java.lang.invoke java.util.concurrent sun.security.action \
    java.net java.io; do
    opens+=("--add-opens=java.base/$package=ALL-UNNAMED")
done
start jobserver.log java "${opens[@]}" -Xmx768m \
    -Dspark.executor.extraClassPath="$(printf '%s:' "$folder"/jars/*.jar)" \
    -Dspark.driver.host=127.0.0.1 -Dspark.executor.memory=700m -Dspark.executor.cores=1 \
    -Dspark.default.parallelism=8 -Dspark.ui.enabled=false \
    -cp "$folder/jars/*:$SPARK_HOME/jars/*" org.apache.beam.runners.spark.SparkJobServerDriver \
    --spark-master-url=spark://127.0.0.1:7077 --job-host=127.0.0.1 --job-port=8099 --artifact-port=8098 \
    --expansion-port=8097 --artifacts-dir="$folder/artifacts"

alive() {
    # Master and both workers; the page lists each with its state.
    [ "$("$python" -c 'import sys, urllib.request as r; print(r.urlopen(sys.argv[1]).read().decode().count("ALIVE"))' \
        http://127.0.0.1:8080/json/ 2>/dev/null || echo 0)" -ge 3 ] && (exec 3<>/dev/tcp/127.0.0.1/8099) 2>/dev/null
}

for _ in $(seq 90); do
    if alive; then
        printf 'spark: ready; foldfeed build ... --runner PortableRunner -- %s %s %s %s\n' \
            "--job_endpoint=127.0.0.1:8099 --environment_type=PROCESS" \
            "'--environment_config={\"command\":\"$folder/boot.sh\"}'" \
            "--sdk_worker_parallelism=1 --environment_cache_millis=3600000" \
            "--files_to_stage=$folder/boot.sh"
        exit 0
    fi
    sleep 1
done
down
stop "it did not come up in 90 s; see $folder/*.log"
