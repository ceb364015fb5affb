//! Sizes on the command line: bytes with a binary suffix.

/// Reads `4096`, `64K`, `256M`, `16G`, `1T` (powers of 1024) as bytes.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        other => return Err(format!("unknown unit {other:?}; use K, M, G or T")),
    };
    let number: u64 = digits.parse().map_err(|_| "expected a number such as 256M".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "the size does not fit into 64 bits".into())
}

/// Smallest guest memory.
const MEMORY_MIN: u64 = 16 << 20;

/// Reads the size of a guest's memory.
pub(super) fn memory(text: &str) -> Result<u64, String> {
    match parse(text)? {
        bytes if bytes < MEMORY_MIN || !bytes.is_multiple_of(4096) => {
            Err("guest memory is a multiple of 4096 and at least 16M".into())
        }
        bytes => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::{memory, parse};

    #[test]
    fn guest_memory_is_whole_pages_and_some() {
        assert_eq!(memory("16M"), Ok(16 << 20));
        for bad in ["0", "1K", "4097", "16777217", "15M"] {
            assert!(memory(bad).unwrap_err().contains("a multiple of 4096 and at least 16M"), "{bad}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(parse("256M"), Ok(256 << 20));
        assert_eq!(parse("1GiB"), Ok(1 << 30));
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("2kb"), Ok(2048));
        for bad in ["", "M", "-1", "1.5G", "3X", "99999999T"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
