"""Builds a training set from a pipeline's history, trains a model on it, and writes down what it was made of.

    python examples/training/train.py sql/transactions.sql --lake ./lake --out ./model [--version N]

Needs `millstream` on the PATH (or MILLSTREAM=path) and `pip install deltalake`. The model is a logistic regression in plain
Python, so that nothing else is needed; put scikit-learn or LightGBM in its place.
"""
import argparse
import csv
import hashlib
import json
import math
import os
import pathlib
import subprocess
import sys

from deltalake import DeltaTable

HERE = pathlib.Path(__file__).parent
FEATURES = ["total_transactions_count", "amount_7d", "hour_of_day"]


def query(arguments, sql, out, **variables):
    """One query of Millstream, into a CSV file."""
    command = [os.environ.get("MILLSTREAM", "millstream"), "query", arguments.files, "--format", "csv", "-c", sql]
    for name, value in {"LAKE": arguments.lake, **variables}.items():
        command += ["--set", f"{name}={value}"]
    with open(out, "wb") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE)
    if done.returncode:
        sys.exit(done.stderr.decode())


def numbers(row):
    """What the model sees: counts and sums span decades, and a user without features is one of its own kind."""
    known = row["total_transactions_count"] != ""
    count, amount, hour = (float(row[name] or 0) for name in FEATURES)
    return [1.0, float(known), math.log1p(count), math.copysign(math.log1p(abs(amount)), amount), hour / 24]


def train(rows, rounds=20, step=0.05):
    """Logistic regression by gradient descent, row by row, in the order of time."""
    weights = [0.0] * len(rows[0][0])
    for _ in range(rounds):
        for x, label in rows:
            error = label - predict(weights, x)
            weights = [w + step * error * value for w, value in zip(weights, x)]
    return weights


def predict(weights, x):
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, sum(w * value for w, value in zip(weights, x))))))


def auc(scored):
    """The share of pairs (positive, negative) that are in the right order."""
    scored = sorted(scored)
    positives = sum(label for _, label in scored)
    ranks, at = 0.0, 0
    while at < len(scored):
        end = at
        while end < len(scored) and scored[end][0] == scored[at][0]:
            end += 1
        ranks += (at + end + 1) / 2 * sum(label for _, label in scored[at:end])
        at = end
    negatives = len(scored) - positives
    return (ranks - positives * (positives + 1) / 2) / (positives * negatives)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("files")
    parser.add_argument("--lake", default="./lake")
    parser.add_argument("--out", default="./model")
    parser.add_argument("--version", type=int, help="of the feature table, as an earlier model.json says; default: the newest")
    arguments = parser.parse_args()
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)

    table = f"{arguments.lake}/user_features"
    version, features = DeltaTable(table).version(), "user_features_training"
    if arguments.version is not None:
        version, features = arguments.version, f"user_features_training VERSION AS OF {arguments.version}"
    labels, rows = out / "labels.csv", out / "training_set.csv"
    # Labels are written once: later ones would be other ones.
    if not labels.exists():
        query(arguments, (HERE / "labels.sql").read_text(), labels)
    sql = (HERE / "training_set.sql").read_text()
    query(arguments, sql, rows, LABELS=labels, FEATURES=features)
    if arguments.version is None and DeltaTable(table).version() != version:
        sys.exit(f"the table got new rows meanwhile: run again with --version {version}")

    data = [(numbers(row), int(row["label"])) for row in csv.DictReader(open(rows))]
    # The test is the later part: a model is asked of a time after that of its training.
    cut = len(data) * 7 // 10
    weights = train(data[:cut])
    found = auc([(predict(weights, x), label) for x, label in data[cut:]])
    model = {
        "features": ["bias", "known", *FEATURES], "weights": weights, "test_auc": round(found, 4),
        "rows": len(data), "positives": sum(label for _, label in data),
        "feature_table": table, "feature_version": version,
        "training_set_sha256": hashlib.sha256(rows.read_bytes()).hexdigest(),
    }
    (out / "model.json").write_text(json.dumps(model, indent=2) + "\n")
    print(f"{len(data)} rows, {model['positives']} positive, features of version {version}, AUC {found:.3f} on the last 30 %")


main()
