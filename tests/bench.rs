//! `pageferry bench` as a user starts it: small runs whose tables and objects are read back, and arguments that make no sense.

mod common;

use common::{Ended, Ferry, Image, MIB, folder, turn};
use serde_json::Value;

/// `bench` with small RAM, one run of each configuration, and more arguments.
#[track_caller]
fn bench(args: &[&str]) -> Ended {
    let _turn = turn();
    let small = ["bench", "--runs", "1", "--no-warm-up"];
    let ended = Ferry::run(small.into_iter().chain(args.iter().copied()));
    ended.code(0);
    ended
}

#[track_caller]
fn rows(ended: &Ended) -> Vec<Value> {
    ended.json()["rows"].as_array().unwrap().clone()
}

#[track_caller]
fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn every_configuration_has_a_row_with_every_figure() {
    let ended = bench(&["--ram", "16M", "--streams", "1,2", "--codecs", "raw,zstd:1", "--json"]);
    let results = ended.json();
    assert_eq!((&results["ram_bytes"], &results["transport"]), (&(16 * MIB).into(), &"tcp".into()));
    let rows = rows(&ended);
    let names: Vec<_> = rows.iter().map(|r| (number(&r["streams"]), r["codec"].as_str().unwrap())).collect();
    assert_eq!(names, [(1.0, "raw"), (2.0, "raw"), (1.0, "zstd:1"), (2.0, "zstd:1")]);
    for row in &rows {
        assert_eq!((row["runs"].as_array().unwrap().len(), &row["failed"]), (1, &Value::Null), "{row}");
        let run = &row["median"];
        for figure in ["total_ms", "setup_ms", "logical_gb_s", "wire_gb_s", "after_setup_gb_s"] {
            assert!(number(&run[figure]) > 0.0, "{figure}: {run}");
        }
        for side in ["source", "destination"] {
            assert!(number(&run[side]["cpu_s"]) > 0.0, "{run}");
            let beyond = number(&run[side]["peak_beyond_bytes"]);
            assert!((1e5..256e6).contains(&beyond), "{side}: {beyond} bytes beyond guest RAM: {run}");
        }
        // 16 MiB blocks: 5 of holes, 1 or 2 of zeros; the rest by codec.
        let pages = &run["pages"];
        assert_eq!(number(&pages["total"]), 4096.0);
        let sent = ["zero", "raw", "compressed"].map(|kind| number(&pages[kind]));
        assert_eq!(number(&pages["hole"]) + sent.iter().sum::<f64>(), 4096.0, "{pages}");
        assert_eq!(sent[2] > 0.0, row["codec"] == "zstd:1", "{pages}");
    }
}

#[test]
fn the_table_has_a_line_for_each_configuration() {
    let ended =
        bench(&["--ram", "8M", "--mix", "dup=50,random=50", "--streams", "2,1", "--transport", "unix"]);
    let lines: Vec<_> = ended.stdout.lines().collect();
    assert!(lines[0].starts_with("8 MiB of RAM (dup=50,random=50) over unix into anon"), "{ended:?}");
    let heads: Vec<_> = lines[2].split_whitespace().collect();
    assert_eq!(heads[..3], ["streams", "codec", "total"], "{ended:?}");
    for (line, streams) in lines[3..5].iter().zip(["2", "1"]) {
        let cells: Vec<_> = line.split_whitespace().collect();
        assert_eq!(cells[..2], [streams, "auto"], "{ended:?}");
        assert!(cells[2].parse::<f64>().unwrap() > 0.0, "{ended:?}");
    }
}

#[test]
fn an_image_moves_into_a_file() {
    let folder = folder();
    let (image, copy) = (folder.path().join("image"), folder.path().join("copy"));
    let content = Image::Mixed.write(&image, 11 * MIB);
    let memory = format!("file:{}", copy.display());
    let ended = bench(&["--image", image.to_str().unwrap(), "--memory", &memory, "--json"]);
    assert_eq!(ended.json()["content"], image.to_str().unwrap());
    assert_eq!(number(&rows(&ended)[0]["median"]["pages"]["hole"]), 1024.0);
    common::assert_same(&copy, &content);
}

#[test]
fn arguments_that_make_no_sense_are_refused_with_a_reason() {
    for (args, code, word) in [
        (&["--mix", "random=50"][..], 2, "50 percent"),
        (&["--mix", "cold=100"], 2, "none of hole"),
        (&["--ram", "4095"], 2, "multiple of 4096"),
        (&["--ram", "0"], 2, "at least 1M"),
        (&["--streams", "1,0"], 2, "1..=256"),
        (&["--codecs", "raw,rar"], 2, "codec"),
        (&["--runs", "0"], 2, "1..=1000"),
        (&["--memory", "disk"], 2, "use anon"),
        (&["--image", "x", "--ram", "1M"], 2, "cannot be used with"),
        (&["--image", "/no/such/file"], 3, "No such file"),
        (&["--ram", "32T"], 3, "are free"),
        (&["--side", "{}"], 0, ""),
    ] {
        let _turn = turn();
        let ended = Ferry::run(["bench"].iter().chain(args));
        ended.code(code).says(&[word]);
        assert!(code != 0 || ended.stdout.contains("is not understood"), "{ended:?}");
    }
}

#[test]
fn a_configuration_that_fails_says_why() {
    let _turn = turn();
    let args = ["bench", "--ram", "2M", "--runs", "1", "--memory", "file:/no/such/folder/file", "--json"];
    let ended = Ferry::run(args);
    ended.code(1).says(&["No such file"]);
    let row = &rows(&ended)[0];
    assert!(row["failed"].as_str().unwrap().contains("No such file"), "{row}");
    assert_eq!((&row["median"], row["runs"].as_array().unwrap().len()), (&Value::Null, 0), "{row}");
}

#[test]
fn a_bench_that_is_interrupted_takes_its_sides_along() {
    let _turn = turn();
    let mut bench = Ferry::start(["bench", "--ram", "64M", "--runs", "1000"]);
    std::thread::sleep(std::time::Duration::from_millis(500));
    bench.signal("INT");
    bench.wait_stderr("stopping in order");
    bench.wait().code(130).says(&["cancelled"]);
}
