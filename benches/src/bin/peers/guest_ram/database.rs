//! A database at work: SQLite with real tables and indexes, in the page cache, in private caches, and in memory alone.
//!
//! The host makes the database, since a guest that is emulated would take long to. The guest reads it into its page cache, through
//! processes that keep what they asked for in caches of their own.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;
use std::process::Command;

use pageferry::measure::process::program;
use pageferry_benches::Random;

use super::cache::{self, Files};
use super::{guest, host};

/// The database's file.
const FILE: &str = "shop.db";
/// Bytes of text that are imported for the database, in percent of the guest's memory. With its indexes it takes 1.7 times as much.
const ORDERS_PERCENT: u64 = 17;
const LINES_PERCENT: u64 = 8;
/// The private cache of each of the processes that read, in percent.
const CACHE_PERCENT: u64 = 12;
/// Orders that are in memory alone, and others that are written to a file of the guest's, of each 100.
const MEMORY_ORDERS: u64 = 20;
const WRITTEN_ORDERS: u64 = 6;

/// How the tables are made of the files that were written for them.
const LOAD: &str = "\
CREATE TABLE customers(id INTEGER PRIMARY KEY, name TEXT, email TEXT, city TEXT, since TEXT, balance REAL);
CREATE TABLE orders(id INTEGER PRIMARY KEY, customer INTEGER, placed TEXT, state TEXT, product TEXT, count INTEGER, total REAL);
CREATE TABLE lines(id INTEGER PRIMARY KEY, file TEXT, number INTEGER, text TEXT);
.mode ascii
.separator \"\\037\" \"\\n\"
.import customers.txt customers
.import orders.txt orders
.import lines.txt lines
CREATE UNIQUE INDEX customers_by_email ON customers(email);
CREATE INDEX orders_by_customer ON orders(customer);
CREATE INDEX orders_by_time ON orders(placed, state);
CREATE INDEX lines_by_file ON lines(file, number);
ANALYZE;
";

const FIRST_NAMES: [&str; 16] = [
    "Anna", "Bruno", "Chen", "Dalia", "Emeka", "Fatima", "Georg", "Hanna", "Ivan", "Julia", "Kofi", "Lena",
    "Marek", "Nadia", "Omar", "Priya",
];
const LAST_NAMES: [&str; 16] = [
    "Almeida", "Berg", "Costa", "Dubois", "Eriksen", "Fischer", "Garcia", "Horvat", "Ivanov", "Jansen",
    "Kaya", "Lopez", "Moreau", "Novak", "Okafor", "Petrov",
];
const CITIES: [&str; 8] = ["Lisbon", "Oslo", "Lagos", "Prague", "Izmir", "Porto Alegre", "Lyon", "Gdansk"];
const STATES: [&str; 8] = ["sent", "sent", "sent", "sent", "paid", "paid", "open", "returned"];
const PRODUCTS: [&str; 12] = [
    "lamp",
    "desk",
    "office chair",
    "shelf, oak",
    "shelf, pine",
    "kettle",
    "notebook A5",
    "notebook A4",
    "bicycle pump",
    "tent",
    "rain jacket",
    "head torch",
];

/// Makes the database in `folder`, for a guest with so much memory.
pub(super) fn prepare(folder: &Path, memory: u64) -> Result<(), String> {
    let sqlite = host::tool("sqlite3", "sqlite3")?;
    write_orders(folder, memory * ORDERS_PERCENT / 100)?;
    write_lines(folder, memory * LINES_PERCENT / 100)?;
    let script = folder.join("load.sql");
    fs::write(&script, LOAD).map_err(host::at(&script))?;
    let input = File::open(&script).map_err(host::at(&script))?;
    host::run(Command::new(sqlite).args(["-bail", "-batch", FILE]).current_dir(folder), Some(input))
}

/// Writes customers and their orders, of `bytes` together. Fields end with the character 31, records with a line.
fn write_orders(folder: &Path, bytes: u64) -> Result<(), String> {
    let (customers, orders) = (folder.join("customers.txt"), folder.join("orders.txt"));
    let open = |path: &Path| File::create(path).map(BufWriter::new).map_err(host::at(path));
    let (mut people, mut sales) = (open(&customers)?, open(&orders)?);
    let mut random = Random::new(17);
    let (mut written, mut second) = (0, 0);
    for id in 1u64.. {
        let order = order(id, &mut second, &mut random);
        sales.write_all(order.as_bytes()).map_err(host::at(&orders))?;
        written += order.len() as u64;
        if id % 8 == 1 {
            let customer = customer(id / 8 + 1, &mut random);
            people.write_all(customer.as_bytes()).map_err(host::at(&customers))?;
            written += customer.len() as u64;
        }
        if written >= bytes {
            break;
        }
    }
    people.flush().map_err(host::at(&customers))?;
    sales.flush().map_err(host::at(&orders))
}

fn pick<'a>(from: &[&'a str], random: &mut Random) -> &'a str {
    from[random.below(from.len())]
}

/// A time of the year, and that many seconds later.
fn time(second: u64) -> String {
    let (day, second) = (second / 86_400, second % 86_400);
    let (year, month) = (2019 + day / 336, 1 + day / 28 % 12);
    format!(
        "{year}-{month:02}-{:02} {:02}:{:02}:{:02}",
        1 + day % 28,
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

fn customer(id: u64, random: &mut Random) -> String {
    let (first, last) = (pick(&FIRST_NAMES, random), pick(&LAST_NAMES, random));
    let email = format!("{}.{}{id}@example.org", first.to_lowercase(), last.to_lowercase());
    let (city, since) = (pick(&CITIES, random), time(random.next_u64() % 100_000_000));
    let balance = random.below(100_000) as f64 / 100.0 - 200.0;
    format!("{id}\x1f{first} {last}\x1f{email}\x1f{city}\x1f{since}\x1f{balance:.2}\n")
}

fn order(id: u64, second: &mut u64, random: &mut Random) -> String {
    *second += random.next_u64() % 90;
    // A few customers order most: the smallest of two is one of the first rather.
    let among = (id / 8 + 1) as usize;
    let customer = 1 + random.below(among).min(random.below(among));
    let (state, product, count) = (pick(&STATES, random), pick(&PRODUCTS, random), 1 + random.below(5));
    let total = count as f64 * (5 + random.below(200)) as f64 - 0.01;
    format!("{id}\x1f{customer}\x1f{}\x1f{state}\x1f{product}\x1f{count}\x1f{total:.2}\n", time(*second))
}

/// Writes lines of the host's text files, of `bytes` together, or fewer where there are not as many.
fn write_lines(folder: &Path, bytes: u64) -> Result<(), String> {
    let path = folder.join("lines.txt");
    let mut lines = BufWriter::new(File::create(&path).map_err(host::at(&path))?);
    let (mut id, mut written) = (0u64, 0);
    host::files(&mut |source| {
        let Ok(file) = File::open(source) else { return Ok(true) };
        // The first line that is no text ends a file that is none.
        let text = BufReader::new(file).lines().map_while(Result::ok).take_while(|line| line.len() < 1000);
        for (number, line) in (1..).zip(text.take(2000)) {
            if line.bytes().any(|byte| byte < 32 && byte != b'\t') {
                break;
            }
            id += 1;
            let record = format!("{id}\x1f{}\x1f{number}\x1f{line}\n", source.display());
            lines.write_all(record.as_bytes()).map_err(host::at(&path))?;
            written += record.len() as u64;
        }
        Ok(written < bytes)
    })?;
    lines.flush().map_err(host::at(&path))
}

/// Fills the guest.
pub(super) fn fill(total: u64, prepared: &Path) -> Result<(), String> {
    let (sqlite, shell) = (host::tool("sqlite3", "sqlite3")?, program("sh").ok_or("the guest has no sh")?);
    let database = prepared.join(FILE);
    // Nobody writes to it, and the host's file system has no locks for the guest.
    let shop = format!("file:{}?immutable=1", database.display());
    let cache = format!("PRAGMA cache_size = -{};\n", (total * CACHE_PERCENT / 100) >> 10);
    let scripts = scripts(&shop, &cache);
    for (name, file, text) in &scripts {
        let path = format!("/dev/shm/{name}.sql");
        let ready = format!("{text}.shell touch {}/{name}\n", guest::READY);
        fs::write(&path, ready).map_err(host::at(Path::new(&path)))?;
        // Its input stays open, so it waits for the next request.
        let line = format!(
            "mkfifo /dev/shm/{name}.in && exec 3<>/dev/shm/{name}.in && \
             '{}' -bail -batch -init {path} '{file}' <&3 >/dev/shm/{name}.out 2>&1; cp /dev/shm/{name}.out {}",
            sqlite.display(),
            guest::failure_file(),
        );
        guest::start(Command::new(&shell).args(["-c", &line]))?;
    }
    guest::wait_until_ready(scripts.len())?;
    // Of the database what the processes did not ask for, and some programs.
    let file = File::open(&database).map_err(host::at(&database))?;
    let mut left = total;
    cache::read(file, total, &mut left);
    cache::fill(Files::Programs, total * cache::FREE_PERCENT / 100, total / 10)
}

/// What each process does: its name, the database that it opens, and its requests.
fn scripts(shop: &str, cache: &str) -> [(&'static str, String, String); 4] {
    let orders = "id INTEGER PRIMARY KEY, customer INTEGER, placed TEXT, state TEXT, product TEXT, count INTEGER, total REAL";
    let tables = format!("CREATE TABLE orders({orders});\nCREATE INDEX by_customer ON orders(customer);\n");
    let copy = |place: &str, rest: u64, part: u64| {
        format!(
            "INSERT INTO {place}orders SELECT * FROM shop.orders WHERE id % 100 >= {rest} AND id % 100 < {rest} + {part};\n"
        )
    };
    [
        // Whole tables.
        (
            "scan",
            shop.to_owned(),
            format!("{cache}SELECT state, count(*), sum(total) FROM orders NOT INDEXED GROUP BY state;\n"),
        ),
        // Rows here and there, by their indexes.
        (
            "look-up",
            shop.to_owned(),
            format!(
                "{cache}SELECT count(*), max(length(text)) FROM lines WHERE file LIKE '%e%';\n\
                 SELECT c.city, sum(o.total) FROM customers c JOIN orders o ON o.customer = c.id WHERE c.id % 40 = 7 GROUP BY 1;\n"
            ),
        ),
        (
            "memory",
            ":memory:".to_owned(),
            format!("{tables}ATTACH '{shop}' AS shop;\n{}", copy("main.", 0, MEMORY_ORDERS)),
        ),
        // The last transaction is not at its end.
        (
            "write",
            "/dev/shm/write.db".to_owned(),
            format!(
                "PRAGMA journal_mode = WAL;\n{tables}ATTACH '{shop}' AS shop;\n{}BEGIN;\n\
                 UPDATE main.orders SET state = 'sent' WHERE id % 10 = 3;\n",
                copy("main.", 50, WRITTEN_ORDERS)
            ),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What SQLite answers.
    fn ask(folder: &Path, query: &str) -> String {
        let output = Command::new("sqlite3").args([FILE, query]).current_dir(folder).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    #[test]
    fn a_database_is_loaded_and_asked() {
        let folder = tempfile::tempdir().unwrap();
        if let Err(error) = prepare(folder.path(), 8 << 20) {
            assert!(error.ends_with("apt-get install sqlite3)"), "{error}");
            return println!("skipped: {error}");
        }
        assert_eq!(ask(folder.path(), "PRAGMA integrity_check"), "ok");
        let bytes = folder.path().join(FILE).metadata().unwrap().len();
        assert!((2 << 20..6 << 20).contains(&bytes), "{bytes}");
        let numbers = ask(folder.path(), "SELECT typeof(total), typeof(customer) FROM orders WHERE id = 1");
        assert_eq!(numbers, "real|integer");
        let plan = ask(folder.path(), "EXPLAIN QUERY PLAN SELECT * FROM orders WHERE customer = 5");
        assert!(plan.contains("orders_by_customer"), "{plan}");
        assert_eq!(ask(folder.path(), "SELECT count(*) > 1000 FROM lines WHERE length(text) > 0"), "1");
        let shop = format!("file:{}?immutable=1", folder.path().join(FILE).display());
        for (name, file, text) in scripts(&shop, "PRAGMA cache_size = -1000;\n") {
            // The file of the guest's is the test's own here.
            let file = file.replace("/dev/shm", &folder.path().display().to_string());
            let script = folder.path().join(name);
            fs::write(&script, text).unwrap();
            let mut sqlite = Command::new("sqlite3");
            sqlite.args(["-bail", "-batch", "-init"]).arg(&script).arg(&file);
            assert_eq!(host::run(&mut sqlite, None), Ok(()), "{name}");
        }
    }

    #[test]
    fn times_go_on() {
        assert_eq!(time(0), "2019-01-01 00:00:00");
        assert_eq!(time(86_400 * 28 + 3661), "2019-02-01 01:01:01");
        assert_eq!(time(86_400 * 336), "2020-01-01 00:00:00");
    }
}
