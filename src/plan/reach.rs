//! How far in time an input row reaches: which rows of a sink another row of the source can change.

use crate::operators::over::Frame;
use crate::plan::{NodeId, NodeKind, StreamPlan};
use crate::stream::Micros;

/// A row of the source at t changes rows of the sink with a time in [t − back, t + ahead].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    pub back: Micros,
    /// `None`: all later rows.
    pub ahead: Option<Micros>,
}

impl StreamPlan {
    /// `None`: the sink's rows have no time, as groups below it never close.
    pub fn reach(&self, id: NodeId) -> Option<Reach> {
        let mut reach = Reach { back: 0, ahead: Some(0) };
        for edge in &self.nodes[id].inputs {
            let below = self.reach(edge.from)?;
            let ahead = reach.ahead.zip(below.ahead).map(|(a, b)| a.max(b));
            reach = Reach { back: reach.back.max(below.back), ahead };
        }
        let further = |by: Micros| reach.ahead.map(|ahead| ahead.saturating_add(by));
        match &self.nodes[id].kind {
            NodeKind::Over(spec) => {
                let frame = |frame: Frame| match frame {
                    Frame::Unbounded => None,
                    Frame::Preceding { micros } => Some(micros),
                };
                let frames: Option<Vec<Micros>> = spec.calls.iter().map(|call| frame(call.frame)).collect();
                let longest = frames.map(|frames| frames.into_iter().max().unwrap_or(0));
                Some(Reach { ahead: longest.and_then(further), ..reach })
            }
            NodeKind::Group(spec) => {
                // The group's time is at most `bound` before that of its rows, or, as an end of a window, behind it.
                let bound = spec.closing?.bound.saturating_abs();
                Some(Reach { back: reach.back.saturating_add(bound), ahead: further(bound) })
            }
            _ => Some(reach),
        }
    }
}
