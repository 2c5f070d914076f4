-- A login for Tally's workers and commands, which may do what the program does and nothing else. Once the database is
-- migrated; safe to repeat:
--
--   PROGRAM_PASSWORD=... psql "$OWNER_DSN" --set=login=tally --file=deploy/login.sql
--
-- Without PROGRAM_PASSWORD the login has none, for servers that know it by certificate or otherwise.
\set ON_ERROR_STOP on
\getenv password PROGRAM_PASSWORD
\if :{?login}
\else
    \set login tally
\endif
SELECT format('CREATE ROLE %I LOGIN', :'login') WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'login') \gexec
GRANT tally_program TO :"login";
\if :{?password}
    ALTER ROLE :"login" PASSWORD :'password';
\endif
