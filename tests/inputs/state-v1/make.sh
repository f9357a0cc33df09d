#!/usr/bin/env bash
# Made this folder, once, by the program whose state files and manifests have format version 1:
#   make.sh /path/to/millstream
# Two runs, with other parallelisms, leave open windows, pending rows, late rows and a dead letter behind;
# input/3.ndjson is for the test that goes on (tests/state_format.rs). Not to be made again: a newer program must
# read what an older one wrote.
set -euo pipefail
cd "$(dirname "$0")"
rm -rf input state lake out
mkdir -p input
rows() { # FILE FIRST COUNT
    awk -v first="$2" -v count="$3" 'BEGIN { for (i = first; i < first + count; i++) {
        late = i % 41 == 7 ? 20000 : (i * 7919) % 4000
        printf "{\"account\": %d, \"at_millis\": %.0f, \"amount\": %d}\n",
            (i * i) % 13, 1770000000000 + i * 700 - late, (i * 31337) % 2000 - 1000 } }' > "input/$1"
}
rows 1.ndjson 0 150
echo '{"account": "none"}' >> input/1.ndjson
"$1" run --name v1 --state ./state --until-end --parallelism 3 --plain pipeline.sql
rows 2.ndjson 150 120
"$1" run --name v1 --state ./state --until-end --parallelism 2 --plain pipeline.sql
rows 3.ndjson 270 130
