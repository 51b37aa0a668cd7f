-- A small lending library: who has which copy, since when, and what is overdue.

CREATE TABLE books (
    isbn        char(13) PRIMARY KEY,
    title       text NOT NULL,
    author      text NOT NULL,
    published   smallint CHECK (published BETWEEN 1450 AND 2100)
);

CREATE TABLE copies (
    copy_id     integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    isbn        char(13) NOT NULL REFERENCES books ON DELETE RESTRICT,
    shelf       text NOT NULL,
    withdrawn   boolean NOT NULL DEFAULT false
);

CREATE TABLE members (
    member_id   integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name        text NOT NULL,
    joined_on   date NOT NULL DEFAULT current_date
);

CREATE TABLE loans (
    copy_id     integer NOT NULL REFERENCES copies,
    member_id   integer NOT NULL REFERENCES members,
    taken_on    date NOT NULL DEFAULT current_date,
    due_on      date NOT NULL DEFAULT current_date + 28,
    returned_on date,
    PRIMARY KEY (copy_id, taken_on),
    CHECK (due_on >= taken_on),
    CHECK (returned_on IS NULL OR returned_on >= taken_on)
);

-- A copy can be with one reader only.
CREATE UNIQUE INDEX one_open_loan ON loans (copy_id) WHERE returned_on IS NULL;

CREATE VIEW overdue AS
SELECT m.name,
       b.title,
       c.shelf,
       current_date - l.due_on AS days_late,
       least(15.00, 0.20 * (current_date - l.due_on)) AS fee
FROM loans AS l
JOIN copies AS c USING (copy_id)
JOIN books AS b USING (isbn)
JOIN members AS m USING (member_id)
WHERE l.returned_on IS NULL
  AND l.due_on < current_date;

-- The ten most wanted books of the last year, with how long a copy stays out.
SELECT b.title,
       count(*) AS times_lent,
       count(DISTINCT l.member_id) AS readers,
       round(avg(coalesce(l.returned_on, current_date) - l.taken_on), 1) AS mean_days
FROM loans AS l
JOIN copies AS c USING (copy_id)
JOIN books AS b USING (isbn)
WHERE l.taken_on >= current_date - interval '1 year'
GROUP BY b.isbn, b.title
HAVING count(*) > 1
ORDER BY times_lent DESC, b.title
LIMIT 10;
