//! Canonical key hash, key groups, and the split of a batch by shard.
//!
//! # The hash, format version 1
//!
//! State files are sorted by a part of this hash, so it never changes; the golden tests below freeze it.
//! All arithmetic is on 64 bits and wraps; bytes are little-endian.
//!
//! ```text
//! mix(x)            the finaliser of splitmix64:
//!                   x ^= x >> 30;  x *= 0xbf58476d1ce4e5b9;  x ^= x >> 27;  x *= 0x94d049bb133111eb;  x ^= x >> 31
//! hash(v1 … vn)     h = 0x6d696c6c73747265;  for v in v1 … vn { h = mix((h + 0x9e3779b97f4a7c15) ^ value(v)) }
//!
//! value(NULL)       0xa0761d6478bd642f
//! value(boolean)    mix(0 or 1 ^ 0xe7037ed1a0b428db)
//! value(integer)    mix(i ^ 0x8ebc6af09c88c6e3) for i as a signed 64-bit number;
//!                   a larger unsigned one u: mix(u ^ 0x589965cc75374cc3)
//! value(decimal)    trailing zeros of the fraction are dropped; what then is an integer of 64 bits hashes as that
//!                   integer; else u, the unscaled value on 128 bits, and s, its scale:
//!                   mix(mix(low(u) ^ 0x1d8e4e27c47d124f) ^ high(u) ^ s << 56)
//! value(float)      mix(bits of the double ^ 0xeb44accab455d165), after −0 → +0 and every NaN → 0x7ff8000000000000
//! value(date)       mix(days since 1970 ^ 0x9c6e6877736c46e3)
//! value(timestamp)  mix(µs since 1970 ^ 0x2f7b9a3c5d1e8f47); finer units round down; the zone does not count
//! value(time)       mix(ns since midnight ^ 0x6c62272e07bb0142)
//! value(text, bytes) h = mix(length ^ 0x4b33a62ed433d4a3); for each 8 bytes as a word w, the last one padded with
//!                   zeros: h = mix(h ^ w)
//! ```
//!
//! Values that compare equal hash alike whatever their physical type: `INT 7`, `BIGINT 7` and `DECIMAL 7.00`;
//! `VARCHAR` in each of its three layouts; a dictionary and its values. Integers and floats do not mix.
//!
//! # Key groups
//!
//! The top byte of the hash is the key's group, fixed for the state's life. A shard owns a contiguous range of
//! groups, so a state file written at one parallelism is read at another one by cutting it.

use std::ops::Range;

use arrow::array::{Array, ArrayRef, ArrowPrimitiveType, AsArray, BooleanArray, PrimitiveArray, UInt32Array};
use arrow::compute::take;
use arrow::datatypes::{
    DataType, Date32Type, Date64Type, Decimal128Type, Float32Type, Float64Type, Int8Type, Int16Type,
    Int32Type, Int64Type, Time32MillisecondType, Time32SecondType, Time64MicrosecondType,
    Time64NanosecondType, TimeUnit, TimestampMicrosecondType, TimestampMillisecondType,
    TimestampNanosecondType, TimestampSecondType, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};

use crate::error::{Error, Result};

pub use super::key_index::{KeyIndex, NO_SLOT};

/// Number of key groups, fixed for every state: the upper bound of parallelism.
pub const KEY_GROUPS: usize = 256;

const START: u64 = 0x6d69_6c6c_7374_7265;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
const NULL: u64 = 0xa076_1d64_78bd_642f;
const BOOLEAN: u64 = 0xe703_7ed1_a0b4_28db;
const INTEGER: u64 = 0x8ebc_6af0_9c88_c6e3;
const BIG_INTEGER: u64 = 0x5899_65cc_7537_4cc3;
const DECIMAL: u64 = 0x1d8e_4e27_c47d_124f;
const FLOAT: u64 = 0xeb44_acca_b455_d165;
const DATE: u64 = 0x9c6e_6877_736c_46e3;
const TIMESTAMP: u64 = 0x2f7b_9a3c_5d1e_8f47;
const TIME: u64 = 0x6c62_272e_07bb_0142;
const BYTES: u64 = 0x4b33_a62e_d433_d4a3;

const MILLIS_PER_DAY: i64 = 86_400_000;

/// The finaliser of splitmix64: a bijection in which every input bit moves every output bit.
#[inline]
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// `value(bytes)` of the module's definition; also the checksum of state files.
#[inline]
pub(crate) fn hash_bytes(bytes: &[u8]) -> u64 {
    let mut hash = mix(bytes.len() as u64 ^ BYTES);
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        hash = mix(hash ^ u64::from_le_bytes(*word));
    }
    if !rest.is_empty() {
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        hash = mix(hash ^ u64::from_le_bytes(last));
    }
    hash
}

/// Whether a column of this type can be (part of) a key.
///
/// # Errors
/// User: nested types, intervals, durations, 256-bit and negative-scale decimals, half floats.
pub fn check_key_type(data_type: &DataType) -> Result<()> {
    use DataType::*;
    match data_type {
        Null | Boolean | Int8 | Int16 | Int32 | Int64 | UInt8 | UInt16 | UInt32 | UInt64 => Ok(()),
        Float32 | Float64 | Date32 | Date64 | Time32(_) | Time64(_) | Timestamp(..) => Ok(()),
        Utf8 | LargeUtf8 | Utf8View | Binary | LargeBinary | BinaryView | FixedSizeBinary(_) => Ok(()),
        Decimal128(_, scale) if *scale >= 0 => Ok(()),
        Dictionary(_, values) => check_key_type(values),
        other => Err(Error::user(format!("a column of type {other} cannot be a key"))
            .hint("Cast it to a text, an integer or a timestamp first.")),
    }
}

/// Hashes each of `rows` rows over `columns`; `out` is cleared first. No columns: all rows get the same hash.
///
/// # Errors
/// User: a column's type cannot be a key. Internal: a column's length is not `rows`.
pub fn hash_keys(columns: &[ArrayRef], rows: usize, out: &mut Vec<u64>) -> Result<()> {
    out.clear();
    out.resize(rows, START);
    for column in columns {
        if column.len() != rows {
            return Err(Error::internal(format!("a key column has {} rows instead of {rows}", column.len())));
        }
        hash_column(column, out)?;
    }
    Ok(())
}

fn hash_column(column: &ArrayRef, out: &mut [u64]) -> Result<()> {
    use DataType::*;
    check_key_type(column.data_type())?;
    let integer = |value: i64| mix(value as u64 ^ INTEGER);
    match column.data_type() {
        Null => out.iter_mut().for_each(|hash| *hash = combine(*hash, NULL)),
        Boolean => booleans(column.as_boolean(), out),
        Int8 => values::<Int8Type>(column, out, |v| integer(i64::from(v))),
        Int16 => values::<Int16Type>(column, out, |v| integer(i64::from(v))),
        Int32 => values::<Int32Type>(column, out, |v| integer(i64::from(v))),
        Int64 => values::<Int64Type>(column, out, integer),
        UInt8 => values::<UInt8Type>(column, out, |v| integer(i64::from(v))),
        UInt16 => values::<UInt16Type>(column, out, |v| integer(i64::from(v))),
        UInt32 => values::<UInt32Type>(column, out, |v| integer(i64::from(v))),
        UInt64 => values::<UInt64Type>(column, out, |v| match i64::try_from(v) {
            Ok(small) => integer(small),
            Err(_) => mix(v ^ BIG_INTEGER),
        }),
        Float32 => values::<Float32Type>(column, out, |v| float(f64::from(v))),
        Float64 => values::<Float64Type>(column, out, float),
        Decimal128(_, scale) => {
            let scale = scale.unsigned_abs();
            values::<Decimal128Type>(column, out, |v| decimal(v, scale));
        }
        Date32 => values::<Date32Type>(column, out, |v| mix(i64::from(v) as u64 ^ DATE)),
        Date64 => values::<Date64Type>(column, out, |v| mix(v.div_euclid(MILLIS_PER_DAY) as u64 ^ DATE)),
        Time32(_) | Time64(_) | Timestamp(..) => hash_times(column, out),
        Utf8 => texts(column.as_string::<i32>().iter().map(|v| v.map(str::as_bytes)), out),
        LargeUtf8 => texts(column.as_string::<i64>().iter().map(|v| v.map(str::as_bytes)), out),
        Utf8View => texts(column.as_string_view().iter().map(|v| v.map(str::as_bytes)), out),
        Binary => texts(column.as_binary::<i32>().iter(), out),
        LargeBinary => texts(column.as_binary::<i64>().iter(), out),
        BinaryView => texts(column.as_binary_view().iter(), out),
        FixedSizeBinary(_) => texts(column.as_fixed_size_binary().iter(), out),
        Dictionary(..) => hash_column(&flatten(column)?, out)?,
        other => return Err(Error::internal(format!("no key hash for type {other}"))),
    }
    Ok(())
}

fn hash_times(column: &ArrayRef, out: &mut [u64]) {
    use TimeUnit::*;
    let micros = |value: i64| mix(value as u64 ^ TIMESTAMP);
    let nanos = |value: i64| mix(value as u64 ^ TIME);
    match column.data_type() {
        DataType::Timestamp(Second, _) => {
            values::<TimestampSecondType>(column, out, |v| micros(v.wrapping_mul(1_000_000)));
        }
        DataType::Timestamp(Millisecond, _) => {
            values::<TimestampMillisecondType>(column, out, |v| micros(v.wrapping_mul(1000)));
        }
        DataType::Timestamp(Microsecond, _) => values::<TimestampMicrosecondType>(column, out, micros),
        DataType::Timestamp(Nanosecond, _) => {
            values::<TimestampNanosecondType>(column, out, |v| micros(v.div_euclid(1000)));
        }
        DataType::Time32(Second) => {
            values::<Time32SecondType>(column, out, |v| nanos(i64::from(v) * 1_000_000_000));
        }
        DataType::Time32(_) => {
            values::<Time32MillisecondType>(column, out, |v| nanos(i64::from(v) * 1_000_000));
        }
        DataType::Time64(Microsecond) => {
            values::<Time64MicrosecondType>(column, out, |v| nanos(v.wrapping_mul(1000)));
        }
        _ => values::<Time64NanosecondType>(column, out, nanos),
    }
}

#[inline]
fn combine(hash: u64, value: u64) -> u64 {
    mix(hash.wrapping_add(STEP) ^ value)
}

fn float(value: f64) -> u64 {
    mix(canonical_float(value).to_bits() ^ FLOAT)
}

/// −0 becomes +0 and every NaN the same NaN, so that keys that compare equal have equal bits.
pub(super) fn canonical_float(value: f64) -> f64 {
    if value.is_nan() { f64::from_bits(0x7ff8_0000_0000_0000) } else { value + 0.0 }
}

fn decimal(mut unscaled: i128, mut scale: u8) -> u64 {
    while scale > 0 && unscaled % 10 == 0 {
        unscaled /= 10;
        scale -= 1;
    }
    match i64::try_from(unscaled) {
        Ok(integer) if scale == 0 => mix(integer as u64 ^ INTEGER),
        _ => mix(mix(unscaled as u64 ^ DECIMAL) ^ (unscaled >> 64) as u64 ^ u64::from(scale) << 56),
    }
}

#[inline]
fn values<T: ArrowPrimitiveType>(column: &ArrayRef, out: &mut [u64], value: impl Fn(T::Native) -> u64) {
    let array: &PrimitiveArray<T> = column.as_primitive();
    match array.nulls().filter(|nulls| nulls.null_count() > 0) {
        None => {
            for (hash, v) in out.iter_mut().zip(array.values()) {
                *hash = combine(*hash, value(*v));
            }
        }
        Some(nulls) => {
            for ((hash, v), valid) in out.iter_mut().zip(array.values()).zip(nulls) {
                *hash = combine(*hash, if valid { value(*v) } else { NULL });
            }
        }
    }
}

fn booleans(array: &BooleanArray, out: &mut [u64]) {
    for (hash, v) in out.iter_mut().zip(array) {
        *hash = combine(*hash, v.map_or(NULL, |v| mix(u64::from(v) ^ BOOLEAN)));
    }
}

fn texts<'a>(column: impl Iterator<Item = Option<&'a [u8]>>, out: &mut [u64]) {
    for (hash, v) in out.iter_mut().zip(column) {
        *hash = combine(*hash, v.map_or(NULL, hash_bytes));
    }
}

/// A dictionary column as a column of its value type.
pub(super) fn flatten(column: &ArrayRef) -> Result<ArrayRef> {
    match column.as_any_dictionary_opt() {
        Some(dictionary) => Ok(take(dictionary.values().as_ref(), dictionary.keys(), None)?),
        None => Err(Error::internal(format!("a key column of type {} is no dictionary", column.data_type()))),
    }
}

/// The key group of a hash.
#[inline]
pub fn key_group(hash: u64) -> u8 {
    (hash >> 56) as u8
}

/// The shard, below `shards` (1 to [`KEY_GROUPS`]), that owns a group.
#[inline]
pub fn shard_of(group: u8, shards: usize) -> usize {
    debug_assert!((1..=KEY_GROUPS).contains(&shards));
    usize::from(group) * shards / KEY_GROUPS
}

/// The groups that a shard owns: the inverse of [`shard_of`].
pub fn groups_of(shard: usize, shards: usize) -> Range<u16> {
    debug_assert!(shard < shards && shards <= KEY_GROUPS);
    let first = |shard: usize| (shard * KEY_GROUPS).div_ceil(shards) as u16;
    first(shard)..first(shard + 1)
}

/// Row numbers per shard (0 to `shards` − 1), each in the order of the batch.
pub fn scatter(hashes: &[u64], shards: usize) -> Vec<UInt32Array> {
    if shards == 1 {
        return vec![UInt32Array::from_iter_values(0..hashes.len() as u32)];
    }
    let mut counts = vec![0; shards];
    for hash in hashes {
        counts[shard_of(key_group(*hash), shards)] += 1;
    }
    let mut rows: Vec<Vec<u32>> = counts.into_iter().map(Vec::with_capacity).collect();
    for (row, hash) in hashes.iter().enumerate() {
        rows[shard_of(key_group(*hash), shards)].push(row as u32);
    }
    rows.into_iter().map(UInt32Array::from).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::*;
    use arrow::compute::cast;

    use super::*;

    fn hash(columns: &[ArrayRef]) -> Vec<u64> {
        let mut out = vec![1, 2, 3];
        hash_keys(columns, columns[0].len(), &mut out).unwrap();
        out
    }

    fn one(array: impl Array + 'static) -> u64 {
        let hashes = hash(&[Arc::new(array) as ArrayRef]);
        assert_eq!(hashes.len(), 1);
        hashes[0]
    }

    /// The format is persistent: if this test fails, the code is wrong, not the numbers.
    #[test]
    fn golden_hashes() {
        let text = |s: &str| one(StringArray::from(vec![s]));
        let golden = [
            (one(Int64Array::from(vec![0])), GOLDEN[0]),
            (one(Int64Array::from(vec![7])), GOLDEN[1]),
            (one(Int64Array::from(vec![-1])), GOLDEN[2]),
            (one(UInt64Array::from(vec![u64::MAX])), GOLDEN[3]),
            (one(Int64Array::from(vec![None])), GOLDEN[4]),
            (text(""), GOLDEN[5]),
            (text("a"), GOLDEN[6]),
            (text("user:1234567890"), GOLDEN[7]),
            (one(Float64Array::from(vec![1.5])), GOLDEN[8]),
            (one(BooleanArray::from(vec![true])), GOLDEN[9]),
            (one(Date32Array::from(vec![20_000])), GOLDEN[10]),
            (one(TimestampMicrosecondArray::from(vec![1_700_000_000_000_000])), GOLDEN[11]),
            (one(Decimal128Array::from(vec![12_345]).with_precision_and_scale(10, 2).unwrap()), GOLDEN[12]),
            (one(Time64NanosecondArray::from(vec![1])), GOLDEN[13]),
            (
                hash(&[Arc::new(Int32Array::from(vec![7])), Arc::new(StringArray::from(vec!["EUR"]))])[0],
                GOLDEN[14],
            ),
        ];
        let got: Vec<String> = golden.iter().map(|(got, _)| format!("{got:#018x}")).collect();
        let want: Vec<String> = golden.iter().map(|(_, want)| format!("{want:#018x}")).collect();
        assert_eq!(got, want);
    }

    /// From a second implementation, written in another language after the module's definition.
    const GOLDEN: [u64; 15] = [
        0x07d4_a8ba_38b9_d34a,
        0x23c8_bf99_a286_c92b,
        0xc8d4_1dae_4a85_61b4,
        0x79cc_df50_16cc_10fc,
        0x68ae_7b39_cd7c_e098,
        0xef4f_3585_6042_5435,
        0xc013_bb87_f439_5f62,
        0x7cc6_3906_d6e1_98a9,
        0x1512_c4b6_c890_a230,
        0x705f_6fa4_1ce5_0d13,
        0x4b6d_bf4a_1f58_a7d5,
        0x5a82_97f4_bacb_c91e,
        0x53f1_9e4f_e41f_3119,
        0x41a4_bdc2_2040_6410,
        0x9231_a8ef_bd4a_eb7b,
    ];

    #[test]
    fn no_columns_is_one_key() {
        let mut out = Vec::new();
        hash_keys(&[], 3, &mut out).unwrap();
        assert_eq!(out, [START; 3]);
        assert!(hash_keys(&[Arc::new(Int8Array::from(vec![1]))], 3, &mut out).is_err());
    }

    #[test]
    fn equal_values_hash_alike_in_every_type() {
        let small: ArrayRef = Arc::new(Int64Array::from(vec![Some(7), None, Some(0), Some(100)]));
        let expected = hash(&[Arc::clone(&small)]);
        use DataType::*;
        for to in [Int8, Int16, Int32, UInt8, UInt16, UInt32, UInt64, Decimal128(12, 0), Decimal128(20, 4)] {
            assert_eq!(hash(&[cast(&small, &to).unwrap()]), expected, "{to}");
        }
        let words = vec![Some("EUR"), None, Some(""), Some("a word of more than twelve bytes")];
        let text: ArrayRef = Arc::new(StringArray::from(words));
        let expected = hash(&[Arc::clone(&text)]);
        let dictionary = Dictionary(Box::new(Int32), Box::new(Utf8));
        for to in [LargeUtf8, Utf8View, Binary, LargeBinary, BinaryView, dictionary] {
            assert_eq!(hash(&[cast(&text, &to).unwrap()]), expected, "{to}");
        }
        let seconds: ArrayRef = Arc::new(TimestampSecondArray::from(vec![-1, 0, 1_700_000_000]));
        let expected = hash(&[Arc::clone(&seconds)]);
        for unit in [TimeUnit::Millisecond, TimeUnit::Microsecond, TimeUnit::Nanosecond] {
            let to = Timestamp(unit, None);
            assert_eq!(hash(&[cast(&seconds, &to).unwrap()]), expected, "{to}");
        }
        let zoned = cast(&seconds, &Timestamp(TimeUnit::Second, Some("UTC".into()))).unwrap();
        let vienna = Timestamp(TimeUnit::Nanosecond, Some("Europe/Vienna".into()));
        assert_eq!(hash(&[cast(&zoned, &vienna).unwrap()]), expected);
        let days: ArrayRef = Arc::new(Date32Array::from(vec![-3, 20_000]));
        assert_eq!(hash(&[cast(&days, &Date64).unwrap()]), hash(&[days]));
    }

    #[test]
    fn floats_hash_by_value() {
        let negative_nan = f64::from_bits(0xfff8_0000_0000_0001);
        let hashes = hash(&[Arc::new(Float64Array::from(vec![0.0, -0.0, f64::NAN, negative_nan, 1.5]))]);
        assert_eq!(hashes[0], hashes[1]);
        assert_eq!(hashes[2], hashes[3]);
        assert_eq!(hashes[4], one(Float32Array::from(vec![1.5f32])));
        assert_ne!(hashes[0], one(Int64Array::from(vec![0])));
    }

    #[test]
    fn combinations_are_unambiguous() {
        let text = |values: Vec<Option<&str>>| Arc::new(StringArray::from(values)) as ArrayRef;
        let left = text(vec![Some("ab"), Some("a"), Some(""), None, Some("c"), Some("a\0")]);
        let right = text(vec![Some("c"), Some("bc"), None, Some(""), Some("ab"), Some("bc")]);
        let mut hashes = hash(&[left, right]);
        hashes.sort_unstable();
        hashes.dedup();
        assert_eq!(hashes.len(), 6);
        assert_ne!(one(UInt64Array::from(vec![u64::MAX])), one(Int64Array::from(vec![-1])));
    }

    #[test]
    fn refuses_what_cannot_be_a_key() {
        let list = DataType::new_list(DataType::Int64, true);
        let error = check_key_type(&list).unwrap_err();
        assert_eq!(error.domain(), crate::error::Domain::User);
        assert!(hash_keys(&[new_empty_array(&list)], 0, &mut Vec::new()).is_err());
        assert!(check_key_type(&DataType::Decimal128(10, -2)).is_err());
    }

    #[test]
    fn groups_are_even_and_shards_contiguous() {
        let mut hashes = Vec::new();
        hash_keys(&[Arc::new(Int64Array::from_iter_values(0..256_000))], 256_000, &mut hashes).unwrap();
        let mut counts = [0usize; KEY_GROUPS];
        hashes.iter().for_each(|hash| counts[usize::from(key_group(*hash))] += 1);
        // 1,000 expected; 8 standard deviations are 253.
        assert!(counts.iter().all(|count| (747..1253).contains(count)), "{counts:?}");
        for shards in 1..=KEY_GROUPS {
            for shard in 0..shards {
                let groups = groups_of(shard, shards);
                assert!(!groups.is_empty());
                assert!(
                    groups.clone().all(|group| shard_of(group as u8, shards) == shard),
                    "{shards} {groups:?}"
                );
            }
            assert_eq!(groups_of(shards - 1, shards).end, 256);
        }
    }

    #[test]
    fn scatter_keeps_order_and_every_row() {
        let hashes: Vec<u64> = (0..1000).map(mix).collect();
        for shards in [1, 2, 3, 7, 256] {
            let parts = scatter(&hashes, shards);
            assert_eq!(parts.len(), shards);
            assert_eq!(parts.iter().map(|part| part.len()).sum::<usize>(), 1000);
            for (shard, part) in parts.iter().enumerate() {
                assert!(part.values().is_sorted());
                let at = |row: &u32| shard_of(key_group(hashes[*row as usize]), shards);
                assert!(part.values().iter().all(|row| at(row) == shard));
            }
        }
    }
}
