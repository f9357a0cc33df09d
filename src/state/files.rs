//! State files: one table of key and state columns, sorted by key group.
//!
//! # Format, version 1
//!
//! A plain Parquet file that any reader opens. Its first column is [`GROUP_COLUMN`], UInt8, not null, never falling
//! from row to row; the others are the operator's own. Key-value metadata: [`VERSION_KEY`] (this format's version)
//! and the Arrow schema. The last eight bytes inside the footer's declared length are our checksum, little-endian:
//! `mix(value(all bytes before it) ^ the file's last eight bytes)` with the functions of
//! [`keys`](super::keys). Readers of Parquet skip them, as they skip the signature of an encrypted file's footer.
//! The checksum is looked at before anything is parsed, so a damaged file is an error, never wrong state.
//!
//! A reader names the range of groups that it owns and gets those rows only: row groups outside are not decoded.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, UInt8Array, UInt32Array};
use arrow::compute::take_record_batch;
use arrow::datatypes::{DataType, Field, Schema, UInt8Type};
use bytes::Bytes;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::metadata::{KeyValue, RowGroupMetaData};
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::statistics::Statistics;

use super::keys::{KEY_GROUPS, hash_bytes, key_group, mix};
use crate::error::{Error, Result};

/// A BOOLEAN column of keyed rows: the key has no row any more, this is the last that it had.
pub const DELETED: &str = "__deleted";

/// Name of the first column: the key group of the row.
pub const GROUP_COLUMN: &str = "__group";
/// Key of the format version in the file's metadata.
pub const VERSION_KEY: &str = "millstream.state.format";
/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 1;

/// The unit of skipping when only some groups are read.
const ROW_GROUP_ROWS: usize = 65_536;
const READ_ROWS: usize = 8192;
const CHECKSUM: usize = 8;
/// A Parquet file ends in the footer's length and the letters `PAR1`.
const TAIL: usize = 8;

/// Puts [`GROUP_COLUMN`] in front and sorts by it; rows of one group keep their order. `hashes` has one per row.
///
/// # Errors
/// Internal: another number of hashes than rows; a column that already has that name.
pub fn sort_by_group(batch: &RecordBatch, hashes: &[u64]) -> Result<RecordBatch> {
    if hashes.len() != batch.num_rows() {
        return Err(Error::internal(format!("{} key hashes for {} rows", hashes.len(), batch.num_rows())));
    }
    if batch.schema_ref().column_with_name(GROUP_COLUMN).is_some() {
        return Err(Error::internal(format!("a state column is named {GROUP_COLUMN}")));
    }
    let mut next = [0u32; KEY_GROUPS];
    hashes.iter().for_each(|hash| next[usize::from(key_group(*hash))] += 1);
    let mut groups = Vec::with_capacity(hashes.len());
    for (group, count) in next.iter_mut().enumerate() {
        let start = groups.len();
        groups.resize(start + *count as usize, group as u8);
        *count = start as u32;
    }
    let mut order = vec![0u32; hashes.len()];
    for (row, hash) in hashes.iter().enumerate() {
        let at = &mut next[usize::from(key_group(*hash))];
        order[*at as usize] = row as u32;
        *at += 1;
    }
    let sorted = take_record_batch(batch, &UInt32Array::from(order))?;
    let mut fields = vec![Arc::new(Field::new(GROUP_COLUMN, DataType::UInt8, false))];
    fields.extend(sorted.schema_ref().fields().iter().cloned());
    let mut columns: Vec<ArrayRef> = vec![Arc::new(UInt8Array::from(groups))];
    columns.extend(sorted.columns().iter().cloned());
    let schema = Schema::new_with_metadata(fields, sorted.schema_ref().metadata().clone());
    Ok(RecordBatch::try_new(Arc::new(schema), columns)?)
}

/// Writes a batch as [`sort_by_group`] makes them.
///
/// # Errors
/// Internal: the first column is not [`GROUP_COLUMN`] or falls; a column type that Parquet cannot hold.
pub fn encode(batch: &RecordBatch) -> Result<Bytes> {
    check_sorted(batch).map_err(Error::internal)?;
    let version = KeyValue::new(VERSION_KEY.to_owned(), VERSION.to_string());
    let properties = WriterProperties::builder()
        .set_compression(Compression::LZ4_RAW)
        .set_dictionary_enabled(false)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_column_statistics_enabled(GROUP_COLUMN.into(), EnabledStatistics::Chunk)
        .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
        .set_key_value_metadata(Some(vec![version]))
        .build();
    let failed = |error: ParquetError| Error::internal("a state file cannot be written").because(error);
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties)).map_err(failed)?;
    writer.write(batch).map_err(failed)?;
    seal(writer.into_inner().map_err(failed)?)
}

/// Inserts the checksum in front of the tail and counts it as part of the footer.
fn seal(mut file: Vec<u8>) -> Result<Bytes> {
    let Some((length, magic)) = file.last_chunk::<TAIL>().map(split_tail) else {
        return Err(Error::internal("the Parquet writer left no footer"));
    };
    let Some(length) = length.checked_add(CHECKSUM as u32) else {
        return Err(Error::internal("the footer of a state file is too long"));
    };
    file.truncate(file.len() - TAIL);
    let mut tail = [0; TAIL];
    tail[..4].copy_from_slice(&length.to_le_bytes());
    tail[4..].copy_from_slice(&magic);
    let sum = checksum(&file, tail);
    file.extend_from_slice(&sum.to_le_bytes());
    file.extend_from_slice(&tail);
    Ok(file.into())
}

fn split_tail(tail: &[u8; TAIL]) -> (u32, [u8; 4]) {
    let [a, b, c, d, m0, m1, m2, m3] = *tail;
    (u32::from_le_bytes([a, b, c, d]), [m0, m1, m2, m3])
}

fn checksum(body: &[u8], tail: [u8; TAIL]) -> u64 {
    mix(hash_bytes(body) ^ u64::from_le_bytes(tail))
}

fn is_whole(file: &[u8]) -> bool {
    let Some((rest, tail)) = file.split_last_chunk::<TAIL>() else { return false };
    let Some((body, sum)) = rest.split_last_chunk::<CHECKSUM>() else { return false };
    checksum(body, *tail) == u64::from_le_bytes(*sum)
}

/// Reads the rows whose group lies in `groups` (`0..256`: all), sorted by group, [`GROUP_COLUMN`] included.
///
/// # Errors
/// External: the bytes are not a whole state file, or one of another format version.
pub fn decode(bytes: Bytes, groups: Range<u16>) -> Result<Vec<RecordBatch>> {
    if !is_whole(&bytes) {
        return Err(damaged("its checksum does not match"));
    }
    let unreadable = |error: ParquetError| damaged("it cannot be read").because(error);
    let builder = ParquetRecordBatchReaderBuilder::try_new(bytes).map_err(unreadable)?;
    check_version(builder.metadata().file_metadata().key_value_metadata())?;
    let row_groups = builder.metadata().row_groups().iter().enumerate();
    let wanted = row_groups.filter(|(_, meta)| may_hold(meta, &groups)).map(|(at, _)| at).collect();
    let reader = builder.with_row_groups(wanted).with_batch_size(READ_ROWS).build().map_err(unreadable)?;
    let mut batches = Vec::new();
    for batch in reader {
        let batch = batch.map_err(|error| damaged("it cannot be read").because(error))?;
        check_sorted(&batch).map_err(damaged)?;
        let kept = cut(&batch, &groups);
        if kept.num_rows() > 0 {
            batches.push(kept);
        }
    }
    Ok(batches)
}

fn damaged(what: impl std::fmt::Display) -> Error {
    Error::external(format!("a state file is damaged: {what}"))
        .hint("Restore the state folder from a copy, or run `millstream reset` to rebuild the state.")
}

fn check_version(metadata: Option<&Vec<KeyValue>>) -> Result<()> {
    let found = metadata.into_iter().flatten().find(|entry| entry.key == VERSION_KEY);
    match found.and_then(|entry| entry.value.as_deref()) {
        Some(version) if version == VERSION.to_string() => Ok(()),
        Some(version) => Err(Error::external(format!(
            "a state file has format version {version}, this program reads version {VERSION}"
        ))
        .hint("Run the pipeline with the Millstream version that wrote its state, or a newer one.")),
        None => Err(damaged("it names no format version")),
    }
}

/// What is wrong with the order of a batch, if anything; checked on write and again on read.
fn check_sorted(batch: &RecordBatch) -> Result<(), String> {
    let first = batch.schema_ref().fields().first();
    if !first.is_some_and(|field| field.name() == GROUP_COLUMN && *field.data_type() == DataType::UInt8) {
        return Err(format!("its first column is not {GROUP_COLUMN}"));
    }
    let groups = batch.column(0).as_primitive::<UInt8Type>();
    if groups.null_count() > 0 || !groups.values().is_sorted() {
        return Err(format!("its rows are not sorted by {GROUP_COLUMN}"));
    }
    Ok(())
}

fn may_hold(meta: &RowGroupMetaData, groups: &Range<u16>) -> bool {
    let statistics = meta.columns().first().and_then(|column| column.statistics());
    let Some(Statistics::Int32(statistics)) = statistics else { return true };
    let (Some(low), Some(high)) = (statistics.min_opt(), statistics.max_opt()) else { return true };
    *high >= i32::from(groups.start) && *low < i32::from(groups.end)
}

fn cut(batch: &RecordBatch, groups: &Range<u16>) -> RecordBatch {
    let of = batch.column(0).as_primitive::<UInt8Type>().values();
    let start = of.partition_point(|group| u16::from(*group) < groups.start);
    let end = of.partition_point(|group| u16::from(*group) < groups.end);
    batch.slice(start, end.saturating_sub(start))
}

#[cfg(test)]
mod tests {
    use arrow::array::*;
    use arrow::compute::concat_batches;

    use super::super::keys::{groups_of, hash_keys};
    use super::*;

    fn keyed(rows: i64) -> (RecordBatch, Vec<u64>) {
        let ids: ArrayRef =
            Arc::new(Int64Array::from_iter((0..rows).map(|v| (v % 11 != 0).then_some(v % 5000))));
        let names: ArrayRef = Arc::new(StringViewArray::from_iter(
            (0..rows).map(|v| (v % 7 != 0).then(|| format!("name of the key {v}"))),
        ));
        let sums: ArrayRef = Arc::new(Float64Array::from_iter_values((0..rows).map(|v| v as f64 / 3.0)));
        let times: ArrayRef =
            Arc::new(TimestampMicrosecondArray::from_iter_values(0..rows).with_timezone("UTC"));
        let mut hashes = Vec::new();
        hash_keys(&[Arc::clone(&ids)], rows as usize, &mut hashes).unwrap();
        let columns = [("id", ids), ("name", names), ("sum", sums), ("time", times)];
        (RecordBatch::try_from_iter_with_nullable(columns.map(|(n, c)| (n, c, true))).unwrap(), hashes)
    }

    fn joined(like: &RecordBatch, parts: &[RecordBatch]) -> RecordBatch {
        concat_batches(&like.schema(), parts).unwrap()
    }

    #[test]
    fn sorts_stably_by_group() {
        let (batch, hashes) = keyed(3000);
        let sorted = sort_by_group(&batch, &hashes).unwrap();
        let mut oracle: Vec<(u8, usize)> = (0..3000).map(|row| (key_group(hashes[row]), row)).collect();
        oracle.sort();
        let groups = sorted.column(0).as_primitive::<UInt8Type>();
        let sums = sorted["sum"].as_primitive::<arrow::datatypes::Float64Type>();
        for (row, (group, from)) in oracle.into_iter().enumerate() {
            assert_eq!((groups.value(row), sums.value(row)), (group, from as f64 / 3.0));
        }
        assert!(sort_by_group(&sorted, &hashes).is_err());
        assert!(sort_by_group(&batch, &hashes[1..]).is_err());
    }

    #[test]
    fn every_group_range_gets_its_rows() {
        // Three row groups, so that skipping is at work.
        let (batch, hashes) = keyed(150_000);
        let sorted = sort_by_group(&batch, &hashes).unwrap();
        let file = encode(&sorted).unwrap();
        assert_eq!(joined(&sorted, &decode(file.clone(), 0..256).unwrap()), sorted);
        for shards in [2, 3, 7] {
            let mut all = Vec::new();
            for shard in 0..shards {
                let groups = groups_of(shard, shards);
                let part = decode(file.clone(), groups.clone()).unwrap();
                for batch in &part {
                    let of = batch.column(0).as_primitive::<UInt8Type>();
                    assert!(of.values().iter().all(|group| groups.contains(&u16::from(*group))));
                }
                all.extend(part);
            }
            assert_eq!(joined(&sorted, &all), sorted);
        }
        assert!(decode(file, 9..9).unwrap().is_empty());
    }

    #[test]
    fn empty_and_unsorted() {
        let (batch, hashes) = keyed(100);
        let empty = sort_by_group(&batch.slice(0, 0), &[]).unwrap();
        assert!(decode(encode(&empty).unwrap(), 0..256).unwrap().is_empty());
        let sorted = sort_by_group(&batch, &hashes).unwrap();
        let backwards = UInt32Array::from_iter_values((0..100).rev());
        assert!(encode(&take_record_batch(&sorted, &backwards).unwrap()).is_err());
        assert!(encode(&batch).is_err());
    }

    #[test]
    fn stays_plain_parquet() {
        let (batch, hashes) = keyed(100);
        let sorted = sort_by_group(&batch, &hashes).unwrap();
        let reader =
            ParquetRecordBatchReaderBuilder::try_new(encode(&sorted).unwrap()).unwrap().build().unwrap();
        assert_eq!(reader.map(|batch| batch.unwrap().num_rows()).sum::<usize>(), 100);
    }

    #[test]
    fn damage_is_an_error() {
        let (batch, hashes) = keyed(200);
        let file = encode(&sort_by_group(&batch, &hashes).unwrap()).unwrap();
        for length in 0..file.len() {
            assert!(decode(file.slice(..length), 0..256).is_err(), "cut to {length} bytes");
        }
        for round in 0..20_000u64 {
            let mut copy = file.to_vec();
            let at = (mix(round) % file.len() as u64) as usize;
            copy[at] ^= 1 << (mix(round ^ 1 << 40) % 8);
            let error = decode(copy.into(), 0..256).unwrap_err();
            assert_eq!(error.domain(), crate::error::Domain::External, "byte {at}");
        }
        assert!(decode(Bytes::from_static(b"not a state file, but long enough for one"), 0..256).is_err());
        let mut dice = crate::stream::dice::Dice(7);
        for _ in 0..5_000 {
            let copy = dice.mutate(&file);
            assert!(copy == file || decode(copy.into(), 0..256).is_err());
        }
    }

    #[test]
    fn refuses_another_version() {
        let (batch, hashes) = keyed(10);
        let sorted = sort_by_group(&batch, &hashes).unwrap();
        for version in [Some("2"), None] {
            let kv = version.map(|v| vec![KeyValue::new(VERSION_KEY.to_owned(), v.to_owned())]);
            let properties = WriterProperties::builder().set_key_value_metadata(kv).build();
            let mut writer = ArrowWriter::try_new(Vec::new(), sorted.schema(), Some(properties)).unwrap();
            writer.write(&sorted).unwrap();
            let error = decode(seal(writer.into_inner().unwrap()).unwrap(), 0..256).unwrap_err();
            assert!(error.message().contains("version"), "{error}");
        }
    }
}
