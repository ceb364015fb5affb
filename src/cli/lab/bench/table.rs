//! What the bench found, as a table and as JSON.

use serde::{Deserialize, Serialize};

use super::image::Kind;
use crate::cli::stats::median;

/// One line: what moved which image, how fast.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Row {
    /// What ran.
    pub what: String,
    /// The image it moved; none for what moves no image.
    pub image: Option<Kind>,
    /// Every run's rate in 10^6 bytes of the image a second, by its whole time.
    pub runs_mb_s: Vec<f64>,
    /// Their median.
    pub median_mb_s: Option<f64>,
    /// The same by the time after setup, which is what the device's limit is measured over.
    pub moving_runs_mb_s: Vec<f64>,
    /// Their median.
    pub moving_median_mb_s: Option<f64>,
    /// Why runs failed.
    pub failed: Option<String>,
}

/// One run's rates, in 10^6 bytes of the image a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rates {
    /// By the whole time.
    pub(super) total: f64,
    /// By the time after setup.
    pub(super) moving: f64,
}

impl Rates {
    /// Of something that has no setup.
    pub(super) fn plain(rate: f64) -> Self {
        Self { total: rate, moving: rate }
    }
}

impl Row {
    /// A row without runs yet.
    pub(super) fn new(what: String, image: Option<Kind>) -> Self {
        Self {
            what,
            image,
            runs_mb_s: vec![],
            median_mb_s: None,
            moving_runs_mb_s: vec![],
            moving_median_mb_s: None,
            failed: None,
        }
    }

    /// Takes in a run. After a failure there are no more.
    pub(super) fn add(&mut self, run: Result<Rates, String>) {
        let round = |rate: f64| (rate * 10.0).round() / 10.0;
        match run {
            Ok(rates) => {
                self.runs_mb_s.push(round(rates.total));
                self.median_mb_s = median(&self.runs_mb_s);
                self.moving_runs_mb_s.push(round(rates.moving));
                self.moving_median_mb_s = median(&self.moving_runs_mb_s);
            }
            Err(reason) => self.failed = Some(reason),
        }
    }
}

/// The whole result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Table {
    /// Bytes of an image.
    pub image_bytes: u64,
    /// What memory files are made of: huge pages where a program asks for them, or 4 KiB pages.
    pub huge_pages: bool,
    /// CPUs of the guest.
    pub cpus: usize,
    /// The guest's kernel.
    pub kernel: String,
    /// The guest's QEMU, which is the host's.
    pub qemu: String,
    /// The lines.
    pub rows: Vec<Row>,
}

/// The table as text. Rates after setup are relative to the device's limit, which is the first row, if it was measured.
pub(super) fn text(table: &Table) -> String {
    let limit = table.rows.first().filter(|row| row.image.is_none());
    let limit = limit.and_then(|row| row.median_mb_s).filter(|rate| *rate > 0.0);
    let width = table.rows.iter().map(|row| row.what.len()).max().unwrap_or(0).max(4);
    let mut text = format!(
        "{} MiB images in {}, {} CPUs, Linux {}, {}; emulated, so only the ratios mean something\n\n",
        table.image_bytes >> 20,
        if table.huge_pages { "huge pages" } else { "4 KiB pages" },
        table.cpus,
        table.kernel,
        table.qemu
    );
    text.push_str(&format!(
        "{:<width$}  {:<6}  {:>11}  {:>15}  {:>11}  {:>8}\n",
        "what", "image", "median MB/s", "least to most", "after setup", "of limit"
    ));
    for row in &table.rows {
        let image = row.image.map_or_else(|| "-".to_owned(), |kind| kind.to_string());
        let start = format!("{:<width$}  {image:<6}  ", row.what);
        text.push_str(&start);
        if let Some(median) = row.median_mb_s {
            let least = row.runs_mb_s.iter().copied().fold(f64::INFINITY, f64::min);
            let most = row.runs_mb_s.iter().copied().fold(0.0, f64::max);
            let spread = format!("{least:.1} to {most:.1}");
            let moving = row.moving_median_mb_s.unwrap_or(median);
            let ratio = limit.map_or_else(String::new, |limit| format!("{:.2}", moving / limit));
            text.push_str(&format!("{median:>11.1}  {spread:>15}  {moving:>11.1}  {ratio:>8}"));
        }
        if let Some(reason) = &row.failed {
            let gap = if row.median_mb_s.is_some() { "  " } else { "" };
            text.push_str(&format!("{gap}failed: {reason}"));
        }
        while text.ends_with(' ') {
            text.pop();
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_rows_are_shown_with_their_reason() {
        let mut limit = Row::new("ib_write_bw".into(), None);
        limit.add(Ok(Rates::plain(60.0)));
        limit.add(Ok(Rates::plain(64.04)));
        let mut ferry = Row::new("pageferry rdma".into(), Some(Kind::Random));
        ferry.add(Err("not a URI".into()));
        let mut half = Row::new("QEMU rdma".into(), Some(Kind::Zero));
        half.add(Ok(Rates { total: 31.0, moving: 40.0 }));
        half.add(Err("timed out".into()));
        let rows = vec![limit, ferry, half];
        let table = Table {
            image_bytes: 128 << 20,
            huge_pages: false,
            cpus: 2,
            kernel: "6.1".into(),
            qemu: "QEMU 10".into(),
            rows,
        };
        let expected = "128 MiB images in 4 KiB pages, 2 CPUs, Linux 6.1, QEMU 10; emulated, so only the ratios mean something\n\n\
            what            image   median MB/s    least to most  after setup  of limit\n\
            ib_write_bw     -              62.0     60.0 to 64.0         62.0      1.00\n\
            pageferry rdma  random  failed: not a URI\n\
            QEMU rdma       zero           31.0     31.0 to 31.0         40.0      0.65  failed: timed out\n";
        assert_eq!(text(&table), expected);
        let json = serde_json::to_string(&table).unwrap();
        assert_eq!(serde_json::from_str::<Table>(&json).unwrap(), table);
    }
}
