//! GROUP BY as a stage: rows in, weighted changes, newest rows and closed windows out, touched keys saved at barriers.

use crate::error::Result;
use crate::operators::group::{Panes, Pushed};
use crate::runtime::counts::Count;
use crate::runtime::keyed::{FULL_EVERY, Piece};
use crate::runtime::report::StatePart;
use crate::runtime::stage::{Operate, Rows};
use crate::stream::{ChangeBatch, Micros, Port};

impl Operate for Panes {
    async fn take_in(&mut self, batch: ChangeBatch) -> Result<Rows> {
        let Pushed { changes, latest } = self.push(&batch)?;
        let both = [(Port::Changes, changes), (Port::Latest, latest)];
        Ok(both.into_iter().filter_map(|(port, rows)| Some((port, rows?))).collect())
    }

    fn pass(&mut self, watermark: Micros) -> Result<(Rows, Micros)> {
        let rows = self.advance(watermark)?.into_iter().map(|rows| (Port::Final, rows)).collect();
        Ok((rows, self.watermark_out()))
    }

    fn save(&mut self, epoch: u64) -> Result<(Vec<Piece>, StatePart)> {
        let full = epoch.is_multiple_of(FULL_EVERY);
        let rows = self.snapshot(full)?;
        let piece = rows.map(|rows| Piece {
            kind: "groups",
            keys: self.key_columns().to_vec(),
            gather: Box::new(|| Ok(Some(rows))),
        });
        let part = StatePart { watermark: self.watermark(), full, ..StatePart::default() };
        Ok((piece.into_iter().collect(), part))
    }

    fn count(&mut self, _: &mut Count) {}
}
