//! The Lua scripts and the texts that they compare.

use std::fmt::Write;
use std::sync::LazyLock;

use redis::Script;

use crate::stream::Place;

/// Values in `ARGV` in front of the field names.
pub(super) const HEADER: usize = 11;

/// Keys of one call.
pub(super) const KEYS_PER_CALL: usize = 1_000;

/// Checks fence and flush number, then writes; all or nothing, as nothing else runs meanwhile.
///
/// `KEYS`: bookkeeping hash, keys to write, keys to delete. `ARGV`: fence, flush field, flush number, number of the
/// call before in the same flush or '', number of the last call that was acknowledged or '', counts of fields, writes and
/// deletes, whether rows have an expiry, whether they have a map of NULLs, count of offsets; field names; pairs of offset
/// field and offset; per row [expiry ms or ''], [NULL map or ''], values.
///
/// A server that does not remember a call which it had acknowledged was set back to an older copy: restarted from its last
/// snapshot, or a replica that was promoted. The fence is taken away then, so that whoever comes next, after a kill too,
/// knows that rows are missing.
///
/// The offsets are raised before the rows are written: whoever reads them after a failure or a kill half way knows that
/// rows up to there may be shown, and shows none that is older. The flush number is set last: when a command fails half way (wrong type, out of memory), the flush counts as not
/// written and is written again. `PEXPIREAT` in the past deletes the key. Only a sink that ever had a ttl pays for
/// taking an old expiry away. Globals are copied to locals because Lua looks each use of a global up by name.
pub(super) const WRITE: &str = r"
local KEYS, ARGV, call, unpack, byte = KEYS, ARGV, redis.call, unpack, string.byte
local book = KEYS[1]
local fence = call('HGET', book, 'fence')
if fence and fence > ARGV[1] then return {'FENCED', fence} end
if not fence or fence < ARGV[1] then return {'LOST', fence or ''} end
local done = call('HGET', book, ARGV[2])
if done and done >= ARGV[3] then return {'STALE', done} end
if ARGV[4] ~= '' and done ~= ARGV[4] then return {'GAP', done or ''} end
if ARGV[5] ~= '' and (not done or done < ARGV[5]) then
  call('HDEL', book, 'fence')
  return {'LOST', done or ''}
end
local fields, writes, deletes = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local expiring, nullable, offsets = ARGV[9] == '1', ARGV[10] == '1', tonumber(ARGV[11])
local expires = call('HGET', book, 'expires')
if expiring and not expires then call('HSET', book, 'expires', '1') end
local pairs_of, set, gone = {}, {}, {}
for f = 1, fields do pairs_of[2 * f - 1] = ARGV[11 + f] end
local at, last = 11 + fields, 2 * fields
for i = at + 1, at + 2 * offsets, 2 do
  local old = call('HGET', book, ARGV[i])
  if not old or old < ARGV[i + 1] then call('HSET', book, ARGV[i], ARGV[i + 1]) end
end
at = at + 2 * offsets
for k = 2, writes + 1 do
  local key, expiry, nulls = KEYS[k], nil, ''
  if expiring then at = at + 1 expiry = ARGV[at] end
  if nullable then at = at + 1 nulls = ARGV[at] end
  if nulls == '' then
    for f = 1, fields do pairs_of[2 * f] = ARGV[at + f] end
    call('HSET', key, unpack(pairs_of, 1, last))
  else
    local s, g = 0, 0
    for f = 1, fields do
      if byte(nulls, f) == 49 then
        g = g + 1 gone[g] = ARGV[11 + f]
      else
        set[s + 1] = ARGV[11 + f] set[s + 2] = ARGV[at + f] s = s + 2
      end
    end
    call('HDEL', key, unpack(gone, 1, g))
    if s > 0 then call('HSET', key, unpack(set, 1, s)) end
  end
  at = at + fields
  if expiring and expiry ~= '' then
    call('PEXPIREAT', key, expiry)
  elseif expires then
    call('PERSIST', key)
  end
end
if deletes > 0 then call('DEL', unpack(KEYS, writes + 2, writes + deletes + 1)) end
call('HSET', book, ARGV[2], ARGV[3])
return {'DONE', ''}
";

/// Sets the fence unless it is higher; returns the fence.
pub(super) const RAISE: &str = r"
local fence = redis.call('HGET', KEYS[1], 'fence')
if fence and fence >= ARGV[1] then return fence end
redis.call('HSET', KEYS[1], 'fence', ARGV[1])
return ARGV[1]
";

/// Names the first command of [`WRITE`] that the user may not run, '' for none. `KEYS`: bookkeeping hash, a key of the
/// prefix; the server itself refuses a user who may not use them. Servers before Redis 7 cannot tell commands beforehand.
pub(super) const PROBE: &str = r"
local may, book, key = redis.acl_check_cmd, KEYS[1], KEYS[2]
if not may then return '' end
local used = {
  {'HGET', book, 'f'}, {'HSET', book, 'f', 'v'}, {'HSET', key, 'f', 'v'}, {'HDEL', key, 'f'},
  {'PEXPIREAT', key, '1'}, {'PERSIST', key}, {'DEL', key},
}
for _, command in ipairs(used) do
  if not may(unpack(command)) then return command[1] end
end
return ''
";

/// Behind the prefix: the key that [`PROBE`] asks for.
pub(super) const PROBE_KEY: &str = "millstream-probe";

static WRITE_SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(WRITE));

/// SHA-1 of [`WRITE`], as `EVALSHA` wants it.
pub(super) fn write_hash() -> &'static str {
    WRITE_SCRIPT.get_hash()
}

/// A generation as text whose order is the order of numbers.
pub(super) fn fence_text(generation: u64) -> String {
    format!("{generation:020}")
}

/// What the numbers of all calls of one flush begin with.
pub(super) fn flush_text(generation: u64, number: u64) -> String {
    format!("{generation:020}-{number:020}-")
}

/// The number of one call.
pub(super) fn call_text(flush: &str, call: usize) -> String {
    format!("{flush}{call:010}")
}

/// Appends what [`flush_text`] gives.
pub(super) fn put_flush(out: &mut String, generation: u64, number: u64) {
    // Writing into a text cannot fail.
    write!(out, "{generation:020}-{number:020}-").ok();
}

/// Appends what [`call_text`] gives.
pub(super) fn put_call(out: &mut String, flush: &str, call: usize) {
    write!(out, "{flush}{call:010}").ok();
}

pub(super) fn shard_field(shard: u32) -> String {
    format!("flush:{shard}")
}

/// Of a cluster's anchors.
pub(super) fn seal_field(shard: u32) -> String {
    format!("seal:{shard}")
}

/// Shard and the newest flush that a [`seal_field`] and its value prove to be written, all of it: an open seal (call 0) is
/// that of a flush which was only about to begin.
pub(super) fn parse_seal(field: &str, value: &str) -> Option<(u32, (u64, u64))> {
    let shard = field.strip_prefix("seal:")?.parse().ok()?;
    let mut parts = value.split('-').map(|part| part.parse::<u64>().ok());
    let (generation, number, call) = (parts.next()??, parts.next()??, parts.next()??);
    Some((shard, (generation, number.saturating_sub(u64::from(call == 0)))))
}

/// Shard, generation and number of a [`shard_field`] and its value; `None` for other fields.
pub(super) fn parse_flush(field: &str, value: &str) -> Option<(u32, (u64, u64))> {
    let shard = field.strip_prefix("flush:")?.parse().ok()?;
    let mut parts = value.split('-').map(|part| part.parse().ok());
    Some((shard, (parts.next()??, parts.next()??)))
}

pub(super) fn offset_field(place: Place) -> String {
    format!("offset:{}:{}:{}", place.0 >> 48, place.topic(), place.partition())
}

/// The inverse of [`offset_field`]; `None` for other fields.
pub(super) fn parse_offset_field(field: &str) -> Option<Place> {
    let mut parts = field.strip_prefix("offset:")?.split(':');
    let place =
        Place::new(parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next().is_none().then_some(place)
}

/// Offsets are never negative; a negative one counts as the beginning.
pub(super) fn offset_text(offset: i64) -> String {
    format!("{:020}", offset.max(0))
}
