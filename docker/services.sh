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
SASL_PORT=${MILLSTREAM_KAFKA_SASL_PORT:-$((KAFKA_PORT + 2))}
TLS_PORT=${MILLSTREAM_KAFKA_TLS_PORT:-$((KAFKA_PORT + 3))}
REDIS_PORT=${MILLSTREAM_REDIS_PORT:-16379}
REDIS_TLS_PORT=${MILLSTREAM_REDIS_TLS_PORT:-$((REDIS_PORT + 1))}
S3_PORT=${MILLSTREAM_S3_PORT:-19000}
BUCKET=millstream-test

# Users that must log in; what they may do: kafka_rights and redis_config. They guard data that is thrown away.
BACKUP_USER=transactions-backup-job-user
FEATURES_USER=transactions-ml-features-job-user
BACKUP_PASSWORD=${MILLSTREAM_KAFKA_BACKUP_PASSWORD:-backup-secret}
FEATURES_PASSWORD=${MILLSTREAM_KAFKA_FEATURES_PASSWORD:-features-secret}
REDIS_PASSWORD=${MILLSTREAM_REDIS_PASSWORD:-redis-secret}

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

variables: MILLSTREAM_KAFKA_PORT (19092; the controller takes the next one, then _SASL_PORT and _TLS_PORT),
           MILLSTREAM_REDIS_PORT (16379; _TLS_PORT takes the next one), MILLSTREAM_S3_PORT (19000),
           MILLSTREAM_KAFKA_BACKUP_PASSWORD, MILLSTREAM_KAFKA_FEATURES_PASSWORD, MILLSTREAM_REDIS_PASSWORD,
           MILLSTREAM_KEEP=1 (start goes on with the data of a service that was killed), MILLSTREAM_CACHE (downloads), MILLSTREAM_RUN (data, logs, pid files, keys)
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
    [[ $1 == s3 ]] || command -v openssl >/dev/null || printf 'openssl\n'
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

# All ports of a service that clients use, the plain one first.
ports_of() {
    case $1 in
    kafka) printf '%s\n' "$KAFKA_PORT,$SASL_PORT,$TLS_PORT" ;;
    redis) printf '%s\n' "$REDIS_PORT,$REDIS_TLS_PORT" ;;
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

# Prints "pid ports" of a service that we started and that still runs.
running() {
    local pid start ports
    [[ -f $RUN/$1.pid ]] || return 1
    read -r pid start ports <"$RUN/$1.pid" || return 1
    [[ $(started_at "$pid") == "$start" ]] || return 1
    printf '%s %s\n' "$pid" "$ports"
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
    printf '%s %s %s\n' "$pid" "$(started_at "$pid")" "$(ports_of "$service")" >"$RUN/$service.pid"
}

port_taken() { (exec 3<>"/dev/tcp/$HOST/$1") 2>/dev/null; }

# require_free PORT VARIABLE
require_free() {
    ! port_taken "$1" || die "port $1 is taken by another process; choose another one with $2"
}

# hex_string TEXT: as the Kafka protocol writes a string, in hex digits.
hex_string() {
    printf '%04x' "${#1}"
    printf '%s' "$1" | od -An -v -tx1 | tr -d ' \n'
}

# kafka_ask API VERSION BODY: one request on the plain port, all three in hex digits; prints the body of the answer.
# A Java tool would say the same after a second of its own start.
kafka_ask() (
    request=$1$2$(printf '%08x' 1)$(hex_string ms)$3
    exec 3<>"/dev/tcp/$HOST/$KAFKA_PORT" || exit 1
    printf '%b' "$(printf '%08x%s' $((${#request} / 2)) "$request" | sed 's/../\\x&/g')" >&3
    size=$(timeout 5 head -c 4 <&3 | od -An -v -tx1 | tr -d ' \n')
    [[ ${#size} == 8 ]] || exit 1
    reply=$(timeout 5 head -c $((16#$size)) <&3 | od -An -v -tx1 | tr -d ' \n')
    printf '%s\n' "${reply:8}"
) 2>/dev/null

# Metadata, version 4, without topics. The second word of the answer is the number of brokers that the controller
# lets take part; an open port alone would not say that.
kafka_answers() {
    local reply
    reply=$(kafka_ask 0003 0004 0000000000) && [[ ${#reply} -ge 16 && ${reply:8:8} != 00000000 ]] &&
        port_taken "$SASL_PORT" && port_taken "$TLS_PORT"
}

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

# Passwords go into URLs, Redis' configuration and Kafka's own notation, so they are plain words.
check_passwords() {
    local name
    for name in BACKUP_PASSWORD FEATURES_PASSWORD REDIS_PASSWORD; do
        [[ ${!name} =~ ^[A-Za-z0-9._~-]+$ ]] || die "the password $name must be of letters, digits and . _ ~ - only"
    done
}

# sign_certificates FOLDER: in it, from its openssl.cnf.
sign_certificates() (
    key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)
    cd "$1" &&
        openssl req -config openssl.cnf -x509 -extensions ca -days 365 -subj '/O=Millstream tests/CN=test CA' \
            "${key[@]}" -keyout ca.key -out ca.pem &&
        openssl req -config openssl.cnf -new -subj '/O=Millstream tests/CN=localhost' \
            "${key[@]}" -keyout server.key -out server.csr &&
        openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -set_serial 1 -days 365 \
            -extfile openssl.cnf -extensions server -out server.crt &&
        cat server.key server.crt >server.pem &&
        rm ca.key server.key server.csr server.crt openssl.cnf
)

# $RUN/tls: ca.pem for the clients, server.pem (key and certificate) for Kafka and Redis. Made anew with the first of
# the two. The key of the CA is not kept: nothing else shall ever be signed with it.
make_certificates() {
    local folder=$RUN/tls new=$RUN/tls.new
    if [[ -d $folder ]] && { running kafka || running redis; } >/dev/null; then
        return
    fi
    rm -rf "$folder" "$new"
    mkdir -p "$new"
    cat >"$new/openssl.cnf" <<EOF
[req]
prompt = no
distinguished_name = name
[name]
O = Millstream tests
[ca]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = IP:$HOST, DNS:localhost
EOF
    sign_certificates "$new" >"$RUN/logs/tls.log" 2>&1 || die "cannot make certificates" "$RUN/logs/tls.log"
    mv "$new" "$folder"
}

kafka_properties() {
    local clients=PLAINTEXT://$HOST:$KAFKA_PORT,SASL://$HOST:$SASL_PORT,TLS://$HOST:$TLS_PORT
    local scram='org.apache.kafka.common.security.scram.ScramLoginModule required;'
    cat <<EOF
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@$HOST:$CONTROLLER_PORT
controller.listener.names=CONTROLLER
listeners=$clients,CONTROLLER://$HOST:$CONTROLLER_PORT
advertised.listeners=$clients
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL:SASL_PLAINTEXT,TLS:SASL_SSL,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
# who comes without a name, on the plain listener, may do everything; the others what kafka_rights says
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
sasl.enabled.mechanisms=SCRAM-SHA-256,SCRAM-SHA-512
listener.name.sasl.scram-sha-256.sasl.jaas.config=$scram
listener.name.sasl.scram-sha-512.sasl.jaas.config=$scram
listener.name.tls.scram-sha-256.sasl.jaas.config=$scram
listener.name.tls.scram-sha-512.sasl.jaas.config=$scram
listener.name.tls.ssl.keystore.type=PEM
listener.name.tls.ssl.keystore.location=$RUN/tls/server.pem
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

# The least that the jobs get by with, as `user operation kind prefix`. Reading and writing include Describe (looking up
# partitions and offsets). Whatever is not here is refused.
# - The backup job reads the topic. Its group's rights are for committing offsets, which lag tools look at; Millstream
#   assigns partitions itself and would read without them.
# - The feature job reads the same and writes topics of its own. An idempotent producer needs no right besides Write.
#   Create is there because a sink makes its missing topic: without it, create the topic for the job.
# - The groups' prefixes do not overlap, so that neither job can move or forget the other one's offsets.
# Not needed, so not given: Describe and the rest on Cluster, DescribeConfigs, Alter, Delete, transactional ids.
# README.md has the same as commands for kafka-acls.sh.
kafka_rights() {
    cat <<EOF
$BACKUP_USER read topic transactions
$BACKUP_USER read group transactions
$FEATURES_USER read topic transactions
$FEATURES_USER read group ml-features
$FEATURES_USER write topic features
$FEATURES_USER create topic features
EOF
}

# Grants kafka_rights with one CreateAcls request (version 1); what is already granted stays so.
grant_rights() {
    local -A code=([topic]=02 [group]=03 [prefixed]=04 [read]=03 [write]=04 [create]=05 [allow]=03)
    local user operation kind prefix rights='' count=0 reply tick
    while read -r user operation kind prefix; do
        rights+=${code[$kind]}$(hex_string "$prefix")${code[prefixed]}
        rights+=$(hex_string "User:$user")$(hex_string '*')${code[$operation]}${code[allow]}
        count=$((count + 1))
    done < <(kafka_rights)
    reply=$(kafka_ask 001e 0001 "$(printf '%08x' "$count")$rights") || reply=
    # No throttling, as many answers, none of them with an error code or a message.
    [[ $reply =~ ^00000000$(printf '%08x' "$count")(0000(ffff|0000)){$count}$ ]] ||
        die "kafka does not take the users' rights (answer: ${reply:0:100})" "$(log_of kafka)"
    # They are stored; the broker that asks for them learns of all of them at once, a moment later. DescribeAcls
    # (version 1) for everything: throttling, error code, no message, then the number of resources.
    for ((tick = 0; tick < 100; tick++)); do
        reply=$(kafka_ask 001d 0001 01ffff01ffffffff0101) || reply=
        if [[ $reply =~ ^000000000000(ffff|0000) && ${reply:16:8} != 00000000 ]]; then
            return
        fi
        sleep 0.05
    done
    die "kafka does not list the users' rights" "$(log_of kafka)"
}

launch_kafka() {
    require_free "$KAFKA_PORT" MILLSTREAM_KAFKA_PORT
    require_free "$CONTROLLER_PORT" MILLSTREAM_KAFKA_CONTROLLER_PORT
    require_free "$SASL_PORT" MILLSTREAM_KAFKA_SASL_PORT
    require_free "$TLS_PORT" MILLSTREAM_KAFKA_TLS_PORT
    make_certificates
    local java config=$RUN/kafka/server.properties log mechanism users=()
    local simple=-Dorg.slf4j.simpleLogger
    log=$(log_of kafka)
    java=$(java_binary) || die "no Java 17 or newer found"
    kafka_properties >"$config"
    for mechanism in SCRAM-SHA-256 SCRAM-SHA-512; do
        users+=(--add-scram "$mechanism=[name=$BACKUP_USER,password=$BACKUP_PASSWORD]")
        users+=(--add-scram "$mechanism=[name=$FEATURES_USER,password=$FEATURES_PASSWORD]")
    done
    "$java" -XX:TieredStopAtLevel=1 -XX:+UseSerialGC "$simple.defaultLogLevel=warn" -cp "$KAFKA_JARS/*" \
        kafka.tools.StorageTool format --ignore-formatted --cluster-id MillstreamTestServices --config "$config" \
        "${users[@]}" >>"$log" 2>&1 </dev/null || die "cannot format Kafka's data folder" "$log"
    launch kafka "$java" -Xms256m -Xmx1g -XX:+UseG1GC -XX:MaxGCPauseMillis=20 -Djava.awt.headless=true \
        "$simple.showDateTime=true" "$simple.dateTimeFormat=HH:mm:ss.SSS" \
        -cp "$KAFKA_JARS/*" kafka.Kafka "$config"
}

# Without a log-in everything is allowed, on both ports. The user `features` may send what a sink and a table of
# Millstream send, for keys of its own and for Millstream's bookkeeping. Redis has no rights for listing: SCAN shows
# the names (not the values) of all keys.
redis_config() {
    local keys='~features:* ~millstream:{*}'
    local commands='+ping +scan +hget +hgetall +hmget +eval +evalsha +script|load'
    commands+=' +hset +hdel +del +persist +pexpireat' # the scripts' own
    cat <<EOF
bind $HOST
port $REDIS_PORT
dir "$RUN/redis"
save ""
appendonly no
daemonize no
tls-port $REDIS_TLS_PORT
tls-cert-file "$RUN/tls/server.pem"
tls-key-file "$RUN/tls/server.pem"
tls-ca-cert-file "$RUN/tls/ca.pem"
tls-auth-clients no
user features on >$REDIS_PASSWORD resetkeys $keys resetchannels -@all $commands
EOF
}

launch_redis() {
    require_free "$REDIS_PORT" MILLSTREAM_REDIS_PORT
    require_free "$REDIS_TLS_PORT" MILLSTREAM_REDIS_TLS_PORT
    make_certificates
    redis_config >"$RUN/redis/redis.conf"
    launch redis redis-server "$RUN/redis/redis.conf"
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
        [[ ${found#* } == "$(ports_of "$service")" ]] ||
            die "$service already runs on port ${found#* }; stop it first: docker/services.sh stop $service"
        say "$service already running on port ${found#* }"
        return
    fi
    [[ ${MILLSTREAM_KEEP:-} == 1 ]] || rm -rf "${RUN:?}/$service"
    mkdir -p "$RUN/$service" "$RUN/logs"
    : >"$(log_of "$service")"
    "launch_$service"
}

start() {
    local service
    check_passwords
    install "$@"
    # Keys, passwords and data of the run are for nobody else.
    umask 077
    chmod go= "$RUN"
    # The broker takes longest and the others do not wait for it.
    for service in "$@"; do
        launch_missing "$service"
    done
    for service in "$@"; do
        wait_ready "$service"
        case $service in
        kafka) grant_rights ;;
        s3) create_bucket ;;
        esac
        say "$service ready on port $(ports_of "$service")"
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
    { running kafka || running redis; } >/dev/null || rm -rf "${RUN:?}/tls" "$RUN/tls.new"
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
        MILLSTREAM_TEST_KAFKA_SASL "$HOST:$SASL_PORT" \
        MILLSTREAM_TEST_KAFKA_TLS "$HOST:$TLS_PORT" \
        MILLSTREAM_TEST_KAFKA_BACKUP_PASSWORD "$BACKUP_PASSWORD" \
        MILLSTREAM_TEST_KAFKA_FEATURES_PASSWORD "$FEATURES_PASSWORD" \
        MILLSTREAM_TEST_REDIS "redis://$HOST:$REDIS_PORT" \
        MILLSTREAM_TEST_REDIS_TLS "rediss://$HOST:$REDIS_TLS_PORT" \
        MILLSTREAM_TEST_REDIS_PASSWORD "$REDIS_PASSWORD" \
        MILLSTREAM_TEST_CA "$RUN/tls/ca.pem" \
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
