//! The result as one page of HTML that needs nothing else: no script, no font, no network.

use std::fmt::Write;

use pageferry::engine::report::{Pages, Round};
use pageferry::pagecopy::layout::PAGE_SIZE;

use super::plots::{self, AXIS, Axes, GRID, INKS, Line, PlotError, TEXT, escape, hex};
use super::result::{self, Results, Row};
use super::series::Series;

/// The kinds that pages are sent as, in the order of their colours.
const KINDS: [&str; 5] = ["raw", "zstd", "delta", "unchanged", "zero"];

const STYLE: &str = "
:root { color-scheme: light dark; --paper: #ffffff; --text: #24292f; --faint: #59636e; --axis: #8c959f; --grid: #e1e4e8;
  --ink0: #2a78d6; --ink1: #c2570c; --ink2: #1a7f37; --ink3: #8250df; --ink4: #6e7781; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --text: #e6edf3; --faint: #9198a1; --axis: #6e7681; --grid: #262c34;
    --ink0: #58a6ff; --ink1: #f0883e; --ink2: #3fb950; --ink3: #bc8cff; --ink4: #8b949e; } }
body { background: var(--paper); color: var(--text); font: 15px/1.5 system-ui, sans-serif;
  max-width: 92rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p, .faint { color: var(--faint); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { font-weight: 600; } th:nth-child(2), td:nth-child(2), th:last-child, td:last-child { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { max-width: 100%; height: auto; display: block; }
.keys { min-height: 1.5em; color: var(--faint); font-size: .87rem; } .key { margin-right: 1.2em; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: .2em; margin-right: .4em; vertical-align: -.05em; }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--faint); }
";

/// The page.
pub(super) fn html(results: &Results) -> Result<String, PlotError> {
    let mut page = String::new();
    let (heading, cells) = (result::heading(results), result::cells(results));
    // Writing to a String cannot fail; so here and below.
    let _ = write!(
        page,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>pageferry bench</title>\n\
         <style>{STYLE}{}</style>\n</head>\n<body>\n<h1>pageferry bench</h1>\n",
        inks()
    );
    for line in &heading {
        let _ = writeln!(page, "<p>{}</p>", escape(line));
    }
    table(&mut page, &cells);
    for line in result::footing(results) {
        let _ = writeln!(page, "<p>{}</p>", escape(&line));
    }
    if let Some(limits) = &results.limits {
        let _ = writeln!(page, "<pre class=\"faint\">{}</pre>", escape(&limits.text(&results.transport)));
    }
    let _ =
        write!(page, "<h2>Scaling over streams</h2>\n<div class=\"plots\">\n{}</div>\n", scaling(results)?);
    for row in &results.rows {
        if let Some(series) = row.typical() {
            configuration(&mut page, row, series)?;
        }
    }
    page.push_str("</body>\n</html>\n");
    Ok(page)
}

/// Gives every colour of a plot the meaning that it has in the style sheet.
fn inks() -> String {
    let inks = INKS.iter().zip(0..).map(|(ink, n)| (*ink, format!("ink{n}")));
    let others = [(TEXT, "text".to_owned()), (AXIS, "axis".to_owned()), (GRID, "grid".to_owned())];
    let mut css = String::new();
    for (colour, name) in inks.chain(others) {
        let colour = hex(colour);
        let _ = writeln!(
            css,
            "svg [stroke=\"{colour}\"] {{ stroke: var(--{name}); }} svg [fill=\"{colour}\"] {{ fill: var(--{name}); }} \
             .{name} {{ background: var(--{name}); }}"
        );
    }
    css
}

fn table(page: &mut String, cells: &[Vec<String>]) {
    page.push_str("<div class=\"wide\"><table>\n");
    for (row, kind) in cells.iter().zip(std::iter::once("th").chain(std::iter::repeat("td"))) {
        page.push_str("<tr>");
        for cell in row {
            let _ = write!(page, "<{kind}>{}</{kind}>", escape(cell));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</table></div>\n");
}

/// How rate and cost change with the number of streams, a line for each codec.
fn scaling(results: &Results) -> Result<String, PlotError> {
    let mut codecs: Vec<&str> = results.rows.iter().map(|row| row.codec.as_str()).collect();
    codecs.dedup();
    let line = |codec: &&str, figure: fn(&result::Run) -> f64| {
        let of_codec = results.rows.iter().filter(|row| row.codec == *codec);
        let point = |row: &Row| row.median.as_ref().map(|run| (f64::from(row.streams), figure(run)));
        let mut points: Vec<_> = of_codec.filter_map(point).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        Line { name: (*codec).to_owned(), points }
    };
    let plot = |title, y, figure| {
        let lines: Vec<_> = codecs.iter().map(|codec| line(codec, figure)).collect();
        plots::lines(&Axes { x: "streams", y, title }, &lines, true)
    };
    let rate = plot("Guest memory moved", "GB/s", |run| run.logical_gb_s)?;
    let cost = plot("CPU time of both sides", "s/GiB", |run| {
        run.source.cpu_s_per_gib + run.destination.cpu_s_per_gib
    })?;
    Ok(rate + &cost)
}

/// One configuration over time, by its typical run.
fn configuration(page: &mut String, row: &Row, series: &Series) -> Result<(), PlotError> {
    let _ = write!(
        page,
        "<h2>{} {}, codec {}</h2>\n<p>The run in the middle by total time.</p>\n<div class=\"plots\">\n",
        row.streams,
        if row.streams == 1 { "stream" } else { "streams" },
        escape(&row.codec)
    );
    let line = |name: &str, points| Line { name: name.into(), points };
    let logical = plots::steps(&series.rates(|s| s.logical_bytes), 1e9);
    let wire = plots::steps(&series.rates(|s| s.wire_bytes), 1e9);
    let axes = Axes { x: "seconds", y: "GB/s", title: "Throughput over time" };
    page.push_str(&plots::lines(
        &axes,
        &[line("page bytes", logical.clone()), line("on the wire", wire)],
        false,
    )?);
    if row.runs.iter().any(|run| run.writing.is_some()) {
        let written = plots::steps(&series.rates(|s| s.written_pages * PAGE_SIZE as u64), 1e9);
        let lines = [
            line("page bytes delivered", logical),
            line("written by the guest", written),
            line("found dirty, by round", dirty_rate(&series.rounds)),
        ];
        let axes = Axes { x: "seconds", y: "GB/s", title: "Dirty rate against transfer rate" };
        page.push_str(&plots::lines(&axes, &lines, false)?);
    }
    let of_rounds = of_rounds(&series.rounds);
    let shares: Vec<_> = of_rounds.iter().map(shares).collect();
    let axes = Axes { x: "round", y: "% of pages", title: "Pages by codec, in each round" };
    page.push_str(&plots::shares(&axes, &KINDS, &shares)?);
    page.push_str("</div>\n<details><summary>Rounds</summary>\n");
    let head = ["round", "ended at ms", "found dirty MiB", "remaining MiB"].into_iter().chain(KINDS);
    let mut cells = vec![head.map(str::to_owned).collect::<Vec<_>>()];
    for ((round, counts), number) in series.rounds.iter().zip(&of_rounds).zip(1..) {
        let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
        let mut line = vec![number.to_string(), format!("{:.1}", round.ended_ms)];
        line.extend([mib(round.dirtied_pages * PAGE_SIZE as u64), mib(round.remaining_bytes)]);
        line.extend(counts.iter().map(u64::to_string));
        cells.push(line);
    }
    table(page, &cells);
    page.push_str("</details>\n");
    Ok(())
}

/// Page bytes found dirty in each round, in 10^9 bytes a second, as a line of steps.
fn dirty_rate(rounds: &[Round]) -> Vec<(f64, f64)> {
    let spans = rounds.windows(2).filter(|pair| pair[1].ended_ms > pair[0].ended_ms);
    let rates: Vec<_> = spans
        .map(|pair| {
            let (from, to) = (pair[0].ended_ms / 1e3, pair[1].ended_ms / 1e3);
            (from, to, (pair[1].dirtied_pages * PAGE_SIZE as u64) as f64 / (to - from))
        })
        .collect();
    plots::steps(&rates, 1e9)
}

/// The pages of each round by what became of them, in the order of [`KINDS`].
fn of_rounds(rounds: &[Round]) -> Vec<[u64; 5]> {
    let all = |pages: &Pages| [pages.raw, pages.compressed, pages.delta, pages.unchanged, pages.zero];
    let mut before = [0; 5];
    rounds
        .iter()
        .map(|round| {
            let now = all(&round.pages);
            let grown = std::array::from_fn(|kind| now[kind].saturating_sub(before[kind]));
            before = now;
            grown
        })
        .collect()
}

fn shares(counts: &[u64; 5]) -> Vec<f64> {
    let all = counts.iter().sum::<u64>().max(1);
    counts.iter().map(|count| *count as f64 / all as f64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_told_apart() {
        let round = |raw, zero| Round { pages: Pages { raw, zero, ..Pages::default() }, ..Round::default() };
        let rounds = of_rounds(&[round(10, 10), round(10, 10), round(13, 11)]);
        assert_eq!(rounds, [[10, 0, 0, 0, 10], [0; 5], [3, 0, 0, 0, 1]]);
        assert_eq!(shares(&rounds[0]), [0.5, 0.0, 0.0, 0.0, 0.5]);
        assert_eq!(shares(&rounds[1]), [0.0; 5]);
    }

    #[test]
    fn what_is_found_dirty_is_a_rate() {
        let round = |ended_ms, dirtied_pages| Round { ended_ms, dirtied_pages, ..Round::default() };
        let rate = dirty_rate(&[round(1000.0, 500), round(1500.0, 1000)]);
        assert_eq!(rate, [(1.0, 8.192e-3), (1.5, 8.192e-3)]);
    }
}
