//! The terminal on stderr: a block of lines that is drawn anew in its place, with log lines above it.
//!
//! While a block is shown, everything that is written to the terminal goes through here: the block is taken away, the
//! text is written where it stood, and the block is drawn again below it. Below the block the cursor waits in column
//! 0. What was changed of the terminal (cursor hidden, echo off, so that `^C` does not tear the block) is put back
//! when [`Live`] is dropped and before a panic says its message.

use std::io::{IsTerminal, Write};

use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Size of a terminal that does not tell.
const UNTOLD: (usize, usize) = (80, 24);

/// The share of the terminal that log lines may keep.
const LEFT_ABOVE: usize = 6;

static STATE: Mutex<State> = Mutex::new(State::new());
static HOOK: Once = Once::new();

struct State {
    live: bool,
    /// Lines of the block.
    frame: Vec<String>,
    /// Lines of the block that stand on the terminal.
    height: usize,
    size: (usize, usize),
    /// Lines that were written above the block.
    above: usize,
    /// The input's settings before they were changed.
    before: Option<Termios>,
}

/// A block is shown as long as this lives.
pub struct Live(());

/// Whether stderr is a terminal and this process is in its foreground (a job in the background must not touch it).
pub fn is_terminal() -> bool {
    stderr().is_terminal() && in_foreground()
}

/// (columns, rows) of the terminal.
fn size() -> (usize, usize) {
    let told = tcgetwinsize(stderr()).ok().map(|size| (size.ws_col.into(), size.ws_row.into()));
    told.filter(|(columns, rows)| *columns > 0 && *rows > 0).unwrap_or(UNTOLD)
}

/// Width of the terminal that data goes to; [`UNTOLD`] where it goes elsewhere.
pub fn columns() -> usize {
    let told = tcgetwinsize(super::output::stdout()).map_or(0, |size| usize::from(size.ws_col));
    if told > 0 { told } else { UNTOLD.0 }
}

/// Shows a block from now on, at first an empty one.
pub fn begin() -> Live {
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // The thread that panics may be the one that draws.
            if let Ok(mut state) = STATE.try_lock() {
                state.leave();
            }
            before(info);
        }));
    });
    let mut state = lock();
    state.live = true;
    state.enter();
    Live(())
}

/// Writes a line above the block.
pub fn note(line: &str) {
    above(format!("{line}\n").as_bytes());
}

/// Writes text that ends in a line break above the block.
pub fn above(text: &[u8]) {
    around(text, || write(text));
}

/// Does what writes `text` to the terminal, while the block is away.
fn around<T>(text: &[u8], work: impl FnOnce() -> T) -> T {
    let mut state = lock();
    state.above += text.iter().filter(|byte| **byte == b'\n').count();
    let mut bytes = Vec::new();
    state.erase(&mut bytes);
    write(&bytes);
    let done = work();
    bytes.clear();
    state.paint(&mut bytes);
    write(&bytes);
    done
}

impl Live {
    /// Draws these lines, none of them wider than the terminal; as many of them as it has room for.
    pub fn draw(&self, lines: Vec<String>) {
        let mut state = lock();
        state.frame = lines;
        let mut bytes = Vec::new();
        state.paint(&mut bytes);
        write(&bytes);
    }

    /// (columns, lines) that a block may have.
    pub fn room(&self) -> (usize, usize) {
        let mut state = lock();
        // The size that was drawn for is kept: a change of it is seen when the next block is drawn.
        let known = std::mem::replace(&mut state.size, size());
        let room = state.room();
        let columns = std::mem::replace(&mut state.size, known).0;
        // The last column stays free: a letter there would be wiped with the rest of its line.
        (columns.saturating_sub(1), room)
    }

    /// The process was stopped and goes on: what stands on the terminal is not known.
    pub fn resume(&self) {
        let mut state = lock();
        state.height = 0;
        state.enter();
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        lock().leave();
    }
}

impl State {
    const fn new() -> Self {
        Self { live: false, frame: Vec::new(), height: 0, size: (0, 0), above: 0, before: None }
    }

    fn enter(&mut self) {
        self.size = size();
        let input = std::io::stdin();
        if input.is_terminal()
            && in_foreground()
            && let Ok(before) = tcgetattr(&input)
        {
            let mut silent = before.clone();
            silent.local_modes &= !(LocalModes::ECHO | LocalModes::ECHONL);
            if tcsetattr(&input, OptionalActions::Now, &silent).is_ok() {
                self.before.get_or_insert(before);
            }
        }
        write(b"\x1b[?25l");
    }

    /// The last block stays; the terminal is as it was.
    fn leave(&mut self) {
        if !std::mem::take(&mut self.live) {
            return;
        }
        (self.height, self.frame) = (0, Vec::new());
        write(b"\x1b[?7h\x1b[?25h");
        if let Some(before) = self.before.take()
            && in_foreground()
        {
            // Nothing can be done if the terminal is gone.
            tcsetattr(std::io::stdin(), OptionalActions::Now, &before).ok();
        }
    }

    /// Goes back to the block's first line. On a terminal whose size has changed lines may have been broken anew, so
    /// nobody knows where that is: then everything is wiped.
    fn home(&mut self, out: &mut Vec<u8>) {
        let now = size();
        if now != std::mem::replace(&mut self.size, now) && self.height > 0 {
            out.extend_from_slice(b"\x1b[2J\x1b[H");
        } else if self.height > 0 {
            out.extend_from_slice(format!("\r\x1b[{}A", self.height).as_bytes());
        }
        self.height = 0;
    }

    /// Lines that a block may have: one is for the cursor, and some are left to what was written above.
    fn room(&self) -> usize {
        let rows = self.size.1;
        rows.saturating_sub(1 + self.above.min(rows / LEFT_ABOVE))
    }

    fn erase(&mut self, out: &mut Vec<u8>) {
        if self.live {
            self.home(out);
            out.extend_from_slice(b"\x1b[J");
        }
    }

    /// Overwrites line by line, in one go: nothing flickers.
    fn paint(&mut self, out: &mut Vec<u8>) {
        if !self.live {
            return;
        }
        out.extend_from_slice(b"\x1b[?2026h\x1b[?7l");
        self.home(out);
        let room = self.room();
        for line in self.frame.iter().take(room) {
            out.extend_from_slice(line.as_bytes());
            out.extend_from_slice(b"\x1b[K\r\n");
        }
        out.extend_from_slice(b"\x1b[J\x1b[?7h\x1b[?2026l");
        self.height = self.frame.len().min(room);
    }
}

fn lock() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[expect(clippy::disallowed_methods, reason = "cli prints")]
fn stderr() -> std::io::Stderr {
    std::io::stderr()
}

/// Nothing can be done if the terminal is gone.
fn write(bytes: &[u8]) {
    if !bytes.is_empty() {
        stderr().lock().write_all(bytes).ok();
    }
}

/// Whether the terminal's foreground group is ours; where the system does not tell, yes.
fn in_foreground() -> bool {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name in brackets: state, parent, group, session, terminal, its foreground group.
    let fields: Vec<&str> =
        stat.rsplit(')').next().map(|rest| rest.split_whitespace().collect()).unwrap_or_default();
    match (fields.get(2), fields.get(5)) {
        (Some(ours), Some(foreground)) => ours == foreground || *foreground == "-1",
        _ => true,
    }
}

/// Where log lines go.
#[derive(Debug, Clone, Copy, Default)]
pub struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        above(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Stdout on the same terminal.
#[derive(Debug)]
pub struct Console;

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        around(bytes, || {
            let mut out = super::output::stdout().lock();
            out.write_all(bytes).and_then(|()| out.flush())
        })?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
