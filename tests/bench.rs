//! `pageferry bench` as a user starts it: small runs whose tables and objects are read back, and arguments that make no sense.

mod common;

use std::io::{Read, Write};

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
        for part in ["scan", "send", "receive", "hash"] {
            assert!(number(&run["time_ms"][part]) > 0.0, "{part}: {run}");
        }
        let compresses = row["codec"] != "raw";
        assert_eq!(number(&run["time_ms"]["encode"]) > 0.0, compresses, "{run}");
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
fn limits_of_the_machine_are_measured_and_put_beside_the_figures() {
    let ended = bench(&["--ram", "8M", "--mix", "random", "--memory", "memfd", "--limit", "--json"]);
    let limits = &ended.json()["limits"];
    for rate in ["memcpy_gb_s", "socket_gb_s", "zero_scan_gb_s"] {
        assert!(number(&limits[rate]) > 0.0, "{rate}: {limits}");
    }
    for kind in ["fault_memfd_gb_s", "fault_anon_4k_gb_s", "fault_anon_huge_gb_s"] {
        assert!(number(&limits[kind]) > 0.0, "{kind}: {limits}");
    }
    let of_limit = &rows(&ended)[0]["of_limit"];
    assert!(number(&of_limit["total"]) > 0.0 && number(&of_limit["wire"]) > 0.0, "{of_limit}");
    assert_eq!(bench(&["--ram", "8M", "--json"]).json()["limits"], Value::Null);
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
fn memory_that_is_written_moves_live_and_arrives_as_it_was_when_the_writers_paused() {
    for (pattern, memory) in [("uniform", "anon"), ("hot:10", "memfd"), ("sequential", "anon4k")] {
        let live = ["--dirty-rate", "40", "--pattern", pattern, "--memory", memory, "--writers", "2"];
        let ended = bench(&[&["--ram", "32M", "--digest", "--json"], &live[..]].concat());
        assert_eq!(ended.json()["dirtying"]["pattern"], pattern, "{ended:?}");
        let run = &rows(&ended)[0]["median"];
        assert!(number(&run["rounds"]) >= 2.0 && number(&run["downtime_ms"]) > 0.0, "{run}");
        assert!(number(&run["writing"]["pages"]) > 0.0, "{run}");
        assert!(number(&run["downtime_ms"]) < number(&run["total_ms"]), "{run}");
    }
}

#[test]
fn a_limited_bandwidth_is_kept() {
    let ended =
        bench(&["--ram", "8M", "--mix", "random", "--bandwidth", "20MB/s", "--codecs", "raw", "--json"]);
    let total = number(&rows(&ended)[0]["median"]["total_ms"]);
    assert!(total > 200.0, "8 MiB at 20 MB/s took {total} ms");
}

/// Whatever a page refers to that is not in it.
fn references(page: &str) -> Vec<&str> {
    ["src=", "href=", "url(", "@import", "<script", "<link", "<iframe"]
        .into_iter()
        .filter(|reference| page.contains(reference))
        .collect()
}

#[test]
fn the_report_is_one_page_with_all_plots() {
    let folder = folder();
    let page = folder.path().join("page.html");
    let args = ["--ram", "32M", "--streams", "1,2", "--dirty-rate", "50", "--report", page.to_str().unwrap()];
    bench(&args);
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>\n"), "{page}");
    assert_eq!(references(&page), <Vec<&str>>::new());
    // Two of scaling, and three for each of two configurations.
    assert_eq!((page.matches("<svg ").count(), page.matches("</svg>").count()), (8, 8), "{page}");
    for (title, count) in [
        ("Guest memory moved", 1),
        ("CPU time of both sides", 1),
        ("Throughput over time", 2),
        ("Dirty rate against transfer rate", 2),
        ("Pages by codec, in each round", 2),
    ] {
        assert_eq!(page.matches(&format!("<figcaption>{title}</figcaption>")).count(), count, "{title}");
    }
    assert!(page.contains("prefers-color-scheme: dark"), "{page}");
    // Every colour in a plot has its meaning in the style sheet.
    for svg in page.split("<svg ").skip(1) {
        let svg = svg.split("</svg>").next().unwrap();
        for part in svg.split("=\"#").skip(1) {
            let rule = format!("=\"#{}\"]", &part[..6]);
            assert!(page.contains(&rule), "{rule}");
        }
    }
}

#[test]
fn two_hosts_measure_together() {
    let _turn = turn();
    let mut listening = Ferry::start(["bench", "--listen", "tcp:127.0.0.1:0", "--memory", "memfd"]);
    const SIGN: &str = "pageferry: listening on ";
    let seen = listening.wait_stderr(SIGN);
    let uri = seen.lines().find_map(|line| line.strip_prefix(SIGN)).unwrap().to_owned();
    // Somebody who asks for something else is refused, and the next one served.
    for bad in
        ["nonsense\n", "{\"version\":\"0\",\"live\":false,\"digest\":false,\"link_timeout_s\":1}\n", "\n"]
    {
        let mut stranger = std::net::TcpStream::connect(uri.strip_prefix("tcp:").unwrap()).unwrap();
        stranger.write_all(bad.as_bytes()).unwrap();
        let mut answer = String::new();
        stranger.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("failed"), "{bad:?}: {answer}");
    }
    let live = ["--dirty-rate", "20", "--digest"];
    for more in [&[][..], &live] {
        let args =
            ["bench", &uri, "--ram", "16M", "--streams", "1,2", "--runs", "1", "--no-warm-up", "--json"];
        let ended = Ferry::run(args.iter().chain(more));
        let results = ended.code(0).json();
        assert_eq!((&results["memory"], &results["transport"]), (&"memfd".into(), &uri.clone().into()));
        for row in rows(&ended) {
            assert!(number(&row["median"]["destination"]["cpu_s"]) > 0.0, "{row}");
        }
    }
    listening.signal("INT");
    listening.wait().code(130);
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
        (&["--pattern", "uniform"], 2, "--dirty-rate"),
        (&["--dirty-rate", "0"], 2, "10^6 bytes a second"),
        (&["--dirty-rate", "5", "--pattern", "hot:0"], 2, "above 0"),
        (&["--dirty-rate", "5", "--write-bytes", "12"], 2, "multiple of 8"),
        (&["--dirty-rate", "5", "--write-bytes", "8K"], 2, "multiple of 8"),
        (&["--dirty-rate", "5", "--trace", "x"], 2, "cannot be used with"),
        (&["--pattern", "trace", "--dirty-rate", "5"], 2, "takes --trace"),
        (&["--trace", "/no/such/file", "--pattern", "hot:5"], 2, "leave out --pattern"),
        (&["--trace", "/no/such/file"], 3, "No such file"),
        (&["--trace", "/proc/self/exe"], 3, "does not begin as a trace"),
        (&["--dirty-rate", "5", "--mix", "hole=100", "--runs", "1"], 1, "nothing to dirty"),
        (&["--report", "/no/such/folder/page.html"], 3, "cannot write to /no/such/folder/page.html"),
        (&["tcp:127.0.0.1:1", "--limit"], 2, "cannot be used with"),
        (&["tcp:127.0.0.1:1", "--runs", "1", "--ram", "1M"], 1, "no destination listens there"),
        (&["--listen", "tcp:127.0.0.1:0", "--ram", "1M"], 2, "cannot be used with"),
        (&["--data-port", "7"], 2, "--listen"),
        (&["--pause-before-switchover"], 2, "leave out --pause-before-switchover"),
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
