//! Data rates on the command line: bits or bytes a second.

/// Reads `1Gbit`, `2.5Gbit/s`, `100MB/s`, `64MiB`, or a plain number of bytes, as bytes a second; 0 stands for no limit.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic() || c == '/');
    let unit = text[number.len()..].trim_end_matches("/s");
    let (scale, bits): (u64, bool) = match unit {
        "" | "B" => (1, false),
        "kB" | "KB" => (1_000, false),
        "MB" => (1_000_000, false),
        "GB" => (1_000_000_000, false),
        "KiB" => (1 << 10, false),
        "MiB" => (1 << 20, false),
        "GiB" => (1 << 30, false),
        "bit" => (1, true),
        "kbit" | "Kbit" => (1_000, true),
        "Mbit" => (1_000_000, true),
        "Gbit" => (1_000_000_000, true),
        "Tbit" => (1_000_000_000_000, true),
        other => {
            return Err(format!(
                "unknown unit {other:?}; use bits (kbit, Mbit, Gbit) or bytes (kB, MB, GB, KiB, MiB, GiB) a second"
            ));
        }
    };
    let value: f64 = number
        .parse()
        .ok()
        .filter(|value: &f64| value.is_finite() && *value >= 0.0)
        .ok_or("expected a rate such as 1Gbit or 100MB/s")?;
    let bytes = value * scale as f64 / if bits { 8.0 } else { 1.0 };
    if value > 0.0 && bytes < 1.0 || bytes > 1e15 {
        return Err("a rate lies between 1 byte and 10^15 bytes a second".into());
    }
    Ok(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn rates() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1Gbit", 125_000_000),
            ("2.5Gbit/s", 312_500_000),
            ("100MB/s", 100_000_000),
            ("100MB", 100_000_000),
            ("1MiB/s", 1 << 20),
            ("800kbit", 100_000),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for bad in ["", "MB", "-1", "3X", "100M", "100MB/h", "nan", "inf", "1bit", "1e30GB", "1 GB"] {
            assert!(parse(bad).is_err(), "{bad}: {:?}", parse(bad));
        }
    }
}
