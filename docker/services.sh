#!/usr/bin/env bash
# Real services for the tests, without Docker: Apache Kafka, Redis and an S3 stand-in, on loopback ports
# of their own, with data that is thrown away. See docker/README.md; `docker/services.sh help` lists the commands.
set -euo pipefail
export LC_ALL=C.UTF-8

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CACHE=${MILLSTREAM_CACHE:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/millstream}
RUN=${MILLSTREAM_RUN:-$CACHE/run}

# The address, not the name `localhost`: that one may mean ::1 first, where nothing listens.
HOST=127.0.0.1
KAFKA_PORT=${MILLSTREAM_KAFKA_PORT:-19092}
CONTROLLER_PORT=${MILLSTREAM_KAFKA_CONTROLLER_PORT:-$((KAFKA_PORT + 1))}
REDIS_PORT=${MILLSTREAM_REDIS_PORT:-16379}
S3_PORT=${MILLSTREAM_S3_PORT:-19000}
BUCKET=millstream-test

ALL=(kafka redis s3)
KAFKA_VERSION=$(sed -n 's:.*<kafka.version>\(.*\)</kafka.version>.*:\1:p' "$HERE/kafka/pom.xml")
KAFKA_JARS=$CACHE/kafka-$KAFKA_VERSION
# The pins name the folder, so a changed pin makes a new environment.
VENV=$CACHE/python-$(sha256sum <"$HERE/requirements.txt" | cut -c1-12)
READY_SECONDS=120 # a JVM that starts beside a compiler on a small machine needs a while

say() { printf 'services: %s\n' "$*" >&2; }

# die MESSAGE [LOG]: one line, then the end of the log.
die() {
    printf 'services: error: %s\n' "$1" >&2
    if [[ -n ${2:-} && -s $2 ]]; then
        printf -- '--- end of %s\n' "$2" >&2
        tail -n 20 "$2" >&2
    fi
    exit 1
}

usage() {
    cat <<'EOF'
usage: docker/services.sh COMMAND [SERVICE…]     services: kafka redis s3 (default: all)

  start     install what is missing, start, wait until each answers; running ones are left alone
  stop      end the processes and delete their data
  status    say what runs; exit code 1 when something does not answer
  env       print the variables that the tests read: eval "$(docker/services.sh env)"
  topic NAME [PARTITIONS]   create a topic (1 partition), the broker does not create them by itself
  install   only install: Debian packages when root, Kafka's jars and a Python environment in the cache folder

variables: MILLSTREAM_KAFKA_PORT (19092; the controller takes the next one), MILLSTREAM_REDIS_PORT (16379),
           MILLSTREAM_S3_PORT (19000), MILLSTREAM_CACHE (downloads), MILLSTREAM_RUN (data, logs, pid files)
EOF
}

# ---- install --------------------------------------------------------------------------------------------------

# logged WHAT COMMAND…: quiet on success, three attempts (downloads fail), the log's end on failure.
logged() {
    local what=$1 log=$CACHE/install.log attempt
    shift
    say "$what"
    for attempt in 1 2 3; do
        if "$@" >"$log" 2>&1 </dev/null 9>&-; then
            return
        fi
        ((attempt == 3)) || sleep 5
    done
    die "failed: $what" "$log"
}

apt_install() {
    (($# > 0)) || return 0
    local apt=(env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -y -qq -o DPkg::Lock::Timeout=300)
    command -v apt-get >/dev/null || die "missing: $*. Install them with this system's package manager."
    [[ $(id -u) == 0 ]] || die "missing: $*. Run as root: apt-get install $*"
    logged "apt-get update" "${apt[@]}" update
    logged "apt-get install $*" "${apt[@]}" install --no-install-recommends "$@"
}

# The first Java that is new enough for the broker.
java_binary() {
    local java version
    for java in "${JAVA_HOME:-}/bin/java" "$(command -v java || true)" /usr/lib/jvm/*/bin/java; do
        [[ -x $java ]] || continue
        version=$("$java" -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' || true)
        if ((${version:-0} >= 17)); then
            printf '%s\n' "$java"
            return
        fi
    done
    return 1
}

java_package() {
    if [[ -n $(apt-cache show openjdk-17-jre-headless 2>/dev/null) ]]; then
        printf 'openjdk-17-jre-headless\n'
    else
        printf 'default-jre-headless\n'
    fi
}

packages_for() {
    case $1 in
    kafka)
        java_binary >/dev/null || java_package
        [[ -d $KAFKA_JARS ]] || command -v mvn >/dev/null || printf 'maven\n'
        ;;
    redis)
        command -v redis-server >/dev/null || printf 'redis-server\n'
        command -v redis-cli >/dev/null || printf 'redis-tools\n'
        ;;
    s3)
        command -v curl >/dev/null || printf 'curl\nca-certificates\n'
        [[ -x $VENV/bin/moto_server ]] || python3 -c 'import venv, ensurepip' 2>/dev/null || printf 'python3-venv\n'
        ;;
    esac
}

download_kafka() {
    [[ ! -d $KAFKA_JARS ]] || return 0
    local part=$KAFKA_JARS.part
    rm -rf "$part"
    logged "downloading Apache Kafka $KAFKA_VERSION" mvn -B -q -ntp -f "$HERE/kafka/pom.xml" \
        dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$part"
    mv "$part" "$KAFKA_JARS"
}

build_venv() {
    [[ ! -e $VENV/complete ]] || return 0
    rm -rf "$VENV"
    logged "making a Python environment" python3 -m venv "$VENV"
    logged "installing docker/requirements.txt" "$VENV/bin/python" -m pip install --no-input \
        --disable-pip-version-check -r "$HERE/requirements.txt"
    touch "$VENV/complete"
}

install() {
    local service packages=()
    for service in "$@"; do
        mapfile -t -O "${#packages[@]}" packages < <(packages_for "$service")
    done
    apt_install "${packages[@]}"
    for service in "$@"; do
        case $service in
        kafka) download_kafka ;;
        s3) build_venv ;;
        esac
    done
}

# ---- processes ------------------------------------------------------------------------------------------------

log_of() { printf '%s/logs/%s.log\n' "$RUN" "$1"; }

port_of() {
    case $1 in
    kafka) printf '%s\n' "$KAFKA_PORT" ;;
    redis) printf '%s\n' "$REDIS_PORT" ;;
    s3) printf '%s\n' "$S3_PORT" ;;
    esac
}

# Clock ticks at which a process started: with the pid it names a process for good, pids come again.
# A process that has ended and only waits to be collected does not count.
started_at() {
    local stat fields
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    read -r -a fields <<<"${stat##*) }"
    [[ ${fields[0]} != [ZX] ]] || return 1
    printf '%s\n' "${fields[19]}"
}

# Prints "pid port" of a service that we started and that still runs.
running() {
    local pid start port
    [[ -f $RUN/$1.pid ]] || return 1
    read -r pid start port <"$RUN/$1.pid" || return 1
    [[ $(started_at "$pid") == "$start" ]] || return 1
    printf '%s %s\n' "$pid" "$port"
}

# launch SERVICE COMMAND…: in a session of its own, holding nothing of the caller's open.
launch() {
    local service=$1 fd pid
    shift
    (
        for fd in /proc/self/fd/*; do
            fd=${fd##*/}
            if ((fd > 2 && fd != 255)); then
                eval "exec $fd>&-"
            fi
        done
        exec setsid "$@"
    ) </dev/null >>"$(log_of "$service")" 2>&1 &
    pid=$!
    printf '%s %s %s\n' "$pid" "$(started_at "$pid")" "$(port_of "$service")" >"$RUN/$service.pid"
}

port_taken() { (exec 3<>"/dev/tcp/$HOST/$1") 2>/dev/null; }

# require_free PORT VARIABLE
require_free() {
    ! port_taken "$1" || die "port $1 is taken by another process; choose another one with $2"
}

# A Metadata request, version 4, without topics. The fourth word of the answer is the number of brokers
# that the controller lets take part; an open port alone would not say that.
kafka_answers() (
    exec 3<>"/dev/tcp/$HOST/$KAFKA_PORT" || exit 1
    printf '\0\0\0\x11\0\x03\0\x04\0\0\0\x01\0\x02ms\0\0\0\0\0' >&3
    reply=$(timeout 5 head -c 16 <&3 | od -An -v -tx1 | tr -d ' \n')
    [[ ${#reply} == 32 && ${reply:24} != 00000000 ]]
) 2>/dev/null

redis_answers() { [[ $(timeout 5 redis-cli -h "$HOST" -p "$REDIS_PORT" ping 2>/dev/null) == PONG ]]; }

s3_answers() { s3_curl "http://$HOST:$S3_PORT/" >/dev/null 2>&1; }

s3_curl() { curl --fail --silent --show-error --max-time 5 --noproxy '*' "$@"; }

wait_ready() {
    local service=$1 log deadline=$((SECONDS + READY_SECONDS))
    log=$(log_of "$service")
    until "${service}_answers"; do
        running "$service" >/dev/null || die "$service ended while it started" "$log"
        ((SECONDS < deadline)) || die "$service did not answer within $READY_SECONDS s" "$log"
        sleep 0.1
    done
}

# ---- start ----------------------------------------------------------------------------------------------------

kafka_properties() {
    cat <<EOF
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@$HOST:$CONTROLLER_PORT
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://$HOST:$KAFKA_PORT,CONTROLLER://$HOST:$CONTROLLER_PORT
advertised.listeners=PLAINTEXT://$HOST:$KAFKA_PORT
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
log.dirs=$RUN/kafka/data
# a typo in a topic name is an error, not a new topic
auto.create.topics.enable=false
# test data may carry old timestamps; a topic that wants retention says so itself
log.retention.ms=-1
# one node
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=4
# small and quick
group.initial.rebalance.delay.ms=0
log.cleaner.dedupe.buffer.size=4194304
num.io.threads=4
num.network.threads=2
controlled.shutdown.enable=false
EOF
}

launch_kafka() {
    require_free "$KAFKA_PORT" MILLSTREAM_KAFKA_PORT
    require_free "$CONTROLLER_PORT" MILLSTREAM_KAFKA_CONTROLLER_PORT
    local java config=$RUN/kafka/server.properties log
    local simple=-Dorg.slf4j.simpleLogger
    log=$(log_of kafka)
    java=$(java_binary) || die "no Java 17 or newer found"
    kafka_properties >"$config"
    "$java" -XX:TieredStopAtLevel=1 -XX:+UseSerialGC "$simple.defaultLogLevel=warn" -cp "$KAFKA_JARS/*" \
        kafka.tools.StorageTool format --cluster-id MillstreamTestServices --config "$config" \
        >>"$log" 2>&1 </dev/null || die "cannot format Kafka's data folder" "$log"
    launch kafka "$java" -Xms256m -Xmx1g -XX:+UseG1GC -XX:MaxGCPauseMillis=20 -Djava.awt.headless=true \
        "$simple.showDateTime=true" "$simple.dateTimeFormat=HH:mm:ss.SSS" \
        -cp "$KAFKA_JARS/*" kafka.Kafka "$config"
}

launch_redis() {
    require_free "$REDIS_PORT" MILLSTREAM_REDIS_PORT
    launch redis redis-server --bind "$HOST" --port "$REDIS_PORT" --dir "$RUN/redis" \
        --save '' --appendonly no --daemonize no
}

launch_s3() {
    require_free "$S3_PORT" MILLSTREAM_S3_PORT
    launch s3 env TMPDIR="$RUN/s3" "$VENV/bin/moto_server" --host "$HOST" --port "$S3_PORT"
}

# The server forgets everything at its end, so its bucket is made at every start.
create_bucket() {
    s3_curl -o /dev/null -X PUT "http://$HOST:$S3_PORT/$BUCKET" || die "cannot create bucket $BUCKET" "$(log_of s3)"
}

# launch_missing SERVICE: nothing when it runs on the wanted port.
launch_missing() {
    local service=$1 found
    if found=$(running "$service"); then
        [[ ${found#* } == "$(port_of "$service")" ]] ||
            die "$service already runs on port ${found#* }; stop it first: docker/services.sh stop $service"
        say "$service already running on port ${found#* }"
        return
    fi
    rm -rf "${RUN:?}/$service"
    mkdir -p "$RUN/$service" "$RUN/logs"
    : >"$(log_of "$service")"
    "launch_$service"
}

start() {
    local service
    install "$@"
    # The broker takes longest and the others do not wait for it.
    for service in "$@"; do
        launch_missing "$service"
    done
    for service in "$@"; do
        wait_ready "$service"
        [[ $service != s3 ]] || create_bucket
        say "$service ready on port $(port_of "$service")"
    done
}

# ---- stop, status, env ----------------------------------------------------------------------------------------

# Ten seconds to end by itself, then SIGKILL: the data is thrown away anyway.
await_end() {
    local service=$1 pid=$2 tick
    for ((tick = 0; tick < 100; tick++)); do
        running "$service" >/dev/null || return 0
        sleep 0.1
    done
    kill -KILL -- "-$pid" 2>/dev/null || true
}

stop() {
    local service found
    local -A pids=()
    for service in "$@"; do
        if found=$(running "$service"); then
            pids[$service]=${found% *}
            kill -TERM -- "-${found% *}" 2>/dev/null || true
        else
            say "$service not running"
        fi
    done
    for service in "${!pids[@]}"; do
        await_end "$service" "${pids[$service]}"
        say "$service stopped"
    done
    for service in "$@"; do
        rm -rf "${RUN:?}/$service" "$RUN/$service.pid"
    done
}

status() {
    local service found worst=0
    for service in "$@"; do
        if ! found=$(running "$service"); then
            printf '%-6s stopped\n' "$service"
            worst=1
        elif "${service}_answers"; then
            printf '%-6s running   port %s, pid %s, log %s\n' "$service" "${found#* }" "${found% *}" "$(log_of "$service")"
        else
            printf '%-6s no answer port %s, pid %s, log %s\n' "$service" "${found#* }" "${found% *}" "$(log_of "$service")"
            worst=1
        fi
    done
    return "$worst"
}

print_env() {
    printf 'export %s=%q\n' \
        MILLSTREAM_TEST_KAFKA "$HOST:$KAFKA_PORT" \
        MILLSTREAM_TEST_REDIS "redis://$HOST:$REDIS_PORT" \
        MILLSTREAM_TEST_S3 "http://$HOST:$S3_PORT" \
        MILLSTREAM_TEST_S3_BUCKET "$BUCKET" \
        MILLSTREAM_TEST_PYTHON "$VENV/bin/python" \
        AWS_ACCESS_KEY_ID test \
        AWS_SECRET_ACCESS_KEY test \
        AWS_REGION us-east-1
}

topic() {
    local java
    (($# == 1 || $# == 2)) || die "usage: docker/services.sh topic NAME [PARTITIONS]"
    kafka_answers || die "kafka does not answer on port $KAFKA_PORT; start it: docker/services.sh start kafka"
    java=$(java_binary) || die "no Java 17 or newer found"
    "$java" -XX:TieredStopAtLevel=1 -Dorg.slf4j.simpleLogger.defaultLogLevel=error -cp "$KAFKA_JARS/*" \
        org.apache.kafka.tools.TopicCommand --bootstrap-server "$HOST:$KAFKA_PORT" \
        --create --topic "$1" --partitions "${2:-1}" >&2
}

# One command at a time: two that install or start at once would trip over each other.
lock() {
    mkdir -p "$CACHE" "$RUN"
    exec 9>"$CACHE/lock"
    flock --wait 1800 9 || die "another docker/services.sh holds $CACHE/lock"
}

main() {
    local command=${1:-help} service
    (($# == 0)) || shift
    if [[ $command == topic ]]; then
        topic "$@"
        return
    fi
    for service in "$@"; do
        [[ " ${ALL[*]} " == *" $service "* ]] || die "unknown service '$service'; known: ${ALL[*]}"
    done
    (($# > 0)) || set -- "${ALL[@]}"
    case $command in
    start | stop | install)
        lock
        "$command" "$@"
        ;;
    status) status "$@" ;;
    env) print_env ;;
    help | -h | --help) usage ;;
    *)
        usage >&2
        exit 2
        ;;
    esac
}

main "$@"
