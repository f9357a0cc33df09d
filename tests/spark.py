"""Reads every Delta table of a lake with Apache Spark and with deltalake and DuckDB: spark.py LAKE JARS

Prints one line per table and exits 1 when a table differs in columns, types or rows (as multisets, to the last bit),
when its statistics count other rows than it has, when it has timestamps that are no instants, or when there is no
table. Whole tables are held in memory. It needs Java 17 and, with the versions that belong together,

    pip install pyspark==4.2.0 deltalake==1.6.6 duckdb==2.0.0
    mvn -f POM dependency:copy-dependencies -DincludeScope=runtime -DincludeGroupIds=io.delta -DoutputDirectory=JARS

where POM depends on io.delta:delta-spark_4.2_2.13:4.4.0. Spark has the other jars itself.
"""
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["TZ"] = "UTC"  # of Python and of the JVM, which hand over timestamps as local time
time.tzset()

import duckdb
from deltalake import DeltaTable, QueryBuilder
from pyspark.sql import SparkSession, types as T

NAMES = {"string": "VARCHAR", "bigint": "BIGINT", "int": "INTEGER", "smallint": "SMALLINT", "tinyint": "TINYINT",
         "double": "DOUBLE", "float": "FLOAT", "boolean": "BOOLEAN", "binary": "BLOB", "date": "DATE",
         "timestamp": "TIMESTAMP WITH TIME ZONE", "timestamp_ntz": "TIMESTAMP"}


def session(jars, scratch):
    found = sorted(str(jar) for jar in Path(jars).glob("*.jar"))
    if not found:
        sys.exit(f"there are no jars in {jars}")
    settings = {
        "spark.jars": ",".join(found),
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.warehouse.dir": scratch,
        "spark.local.dir": scratch,
        "spark.driver.memory": "768m",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "WARN",
        "spark.sql.shuffle.partitions": "1",
        "spark.databricks.delta.snapshotPartitions": "1",
    }
    builder = SparkSession.builder.master("local[1]").appName("millstream")
    for name, value in settings.items():
        builder = builder.config(name, value)
    return builder.getOrCreate()


def duckdb_type(kind):
    """What DuckDB calls a type of Spark."""
    if isinstance(kind, T.StructType):
        return "STRUCT(" + ", ".join(f"{quoted(f.name)} {duckdb_type(f.dataType)}" for f in kind.fields) + ")"
    if isinstance(kind, T.ArrayType):
        return duckdb_type(kind.elementType) + "[]"
    if isinstance(kind, T.MapType):
        return f"MAP({duckdb_type(kind.keyType)}, {duckdb_type(kind.valueType)})"
    if isinstance(kind, T.DecimalType):
        return f"DECIMAL({kind.precision},{kind.scale})"
    return NAMES[kind.simpleString()]


def quoted(name):
    return '"' + name.replace('"', '""') + '"'


def plain(value):
    """The same Python value for the same value of either engine."""
    if isinstance(value, T.Row):
        value = value.asDict()
    if isinstance(value, dict):
        return sorted((key, plain(one)) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    return value


def multiset(rows):
    # As text: floats print with all their digits and NaN is equal to itself.
    return Counter(repr([plain(value) for value in row]) for row in rows)


def read_by_deltalake(db, folder):
    """Version, columns as (name, type), rows, and what is wrong whoever reads it."""
    delta = DeltaTable(str(folder))
    # Partition columns stand in the log only, so the table is read by its own library.
    found = QueryBuilder().register("t", delta).execute("SELECT * FROM t").read_all()
    db.register("found", found)
    relation = db.table("found")
    columns = [(name, db.dtype(str(kind))) for name, kind in zip(relation.columns, relation.types)]
    # Without zone, so that DuckDB needs no Python package for zones; it converts by its own zone, UTC.
    bare = [f"{quoted(name)}::{str(kind).replace(NAMES['timestamp'], NAMES['timestamp_ntz'])}" for name, kind in columns]
    rows = db.execute(f"SELECT {', '.join(bare)} FROM found").fetchall()
    db.unregister("found")
    faults = [f"{name} is {kind}, which has no zone" for name, kind in columns
              if NAMES["timestamp_ntz"] in str(kind).replace(NAMES["timestamp"], "")]
    if files := delta.file_uris():
        # Both readers believe the log: whether a file says that its times are instants, only its footer tells.
        odd = db.execute("SELECT DISTINCT name FROM parquet_schema(?) "
                         "WHERE logical_type::VARCHAR LIKE '%TimestampType%isAdjustedToUTC=0%'", [files]).fetchall()
        faults += [f"{name} has no zone in a file" for name, in odd]
    return delta.version(), columns, rows, faults


def compare(spark, db, folder):
    """A line about the table, and its faults."""
    version, columns, rows, faults = read_by_deltalake(db, folder)
    frame = spark.read.format("delta").option("versionAsOf", version).load(str(folder))
    seen = [(field.name, db.dtype(duckdb_type(field.dataType))) for field in frame.schema.fields]
    if seen != columns:
        only = [f"{name} {kind}" for name, kind in seen if (name, kind) not in columns]
        other = [f"{name} {kind}" for name, kind in columns if (name, kind) not in seen]
        faults.append(f"columns: only Spark has {only}, only deltalake {other}" if only or other else "order of columns")
    collected = frame.collect()
    if len(collected) != len(rows):
        faults.append(f"Spark reads {len(collected)} rows, deltalake {len(rows)}")
    counted = frame.count()  # which Delta answers from the statistics in the log
    if counted != len(collected):
        faults.append(f"Spark counts {counted} rows by statistics and reads {len(collected)}")
    ours, theirs = multiset(collected), multiset(rows)
    for name, more, less in (("Spark", ours, theirs), ("deltalake", theirs, ours)):
        only = more - less
        if only:
            faults.append(f"{only.total()} rows only in {name}, for example {next(iter(only))}")
    return f"version {version}, {len(collected)} rows, {len(seen)} columns", faults


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__.splitlines()[0])
    lake, jars = Path(sys.argv[1]).resolve(), sys.argv[2]
    tables = sorted(log.parent for log in lake.rglob("_delta_log") if log.is_dir())
    if not tables:
        sys.exit(f"there is no Delta table in {lake}")
    db = duckdb.connect()
    db.execute("SET TimeZone = 'UTC'")
    bad = 0
    with tempfile.TemporaryDirectory() as scratch:
        spark = session(jars, scratch)
        print(f"Spark {spark.version}, DuckDB {duckdb.__version__}")
        for folder in tables:
            try:
                line, faults = compare(spark, db, folder)
            except Exception as error:  # one table that cannot be read does not hide the others
                line, faults = "not read", [f"{type(error).__name__}: {error}"]
            bad += bool(faults)
            print(f"{folder.relative_to(lake)}: {line}, {'DIFFERS' if faults else 'same'}", *faults, sep="\n    ", flush=True)
        spark.stop()
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
