<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="${policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="robots" content="noindex">
<title>${title}</title>
<style>
${style | n}</style>
</head>
<body>
<header>
  <div>
    <h1>${title}</h1>
    <p class="soft">${subtitle}</p>
  </div>
  <button class="theme" id="theme" type="button" title="Change between light and dark" hidden>Dark</button>
</header>
<main>
<dl class="tiles">
% for tile in tiles:
  <div class="${tile['kind']}">
    <dt>${tile['label']}</dt>
    <dd class="figure" title="${tile['full']}">${tile['figure']}</dd>
    <dd class="note">${tile['note']}</dd>
  </div>
% endfor
</dl>
% if columns.columns:
<section class="card" aria-labelledby="time">
  <h2 id="time">Drift over time</h2>
  <p class="legend"><span class="o">overstated: shown, but gone</span><span class="u">understated: left, but not shown</span></p>
  <div class="time">
    <div class="ends"><span>+${compact(columns.highest)}</span><span>−${compact(columns.lowest)}</span></div>
    <svg viewBox="0 0 ${columns.width} ${columns.height}" preserveAspectRatio="none" role="img" aria-label="Drifted tokens of ${len(columns.columns)} runs, from ${show(columns.columns[0].run.tokens_drifted)} to ${show(columns.columns[-1].run.tokens_drifted)}; the figures are in the table below">
% for column in columns.columns:
      <g><title>Run ${column.run.id}, ${show(column.run.started_at)}: ${show(column.run.tokens_overstated)} overstated, ${show(column.run.tokens_understated)} understated, ${show(column.run.drifted)} drifts</title>
% if column.is_this:
        <rect class="this" x="${column.x - (columns.slot - columns.bar) / 2}" y="0" width="${columns.slot}" height="${columns.height}"/>
% endif
        <rect class="o" x="${column.x}" y="${columns.middle - column.up}" width="${columns.bar}" height="${column.up}"/>
        <rect class="u" x="${column.x}" y="${columns.middle}" width="${columns.bar}" height="${column.down}"/>
      </g>
% endfor
      <line class="zero" x1="0" x2="${columns.width}" y1="${columns.middle}" y2="${columns.middle}"/>
    </svg>
    <div class="dates"><span>${show(columns.columns[0].run.started_at)[:16]}</span><span>${show(columns.columns[-1].run.started_at)[:16]}</span></div>
  </div>
  <details>
    <summary>The figures of these ${len(columns.columns)} runs</summary>
    <div class="scroll">
    <table>
      <caption>Runs over all users, oldest first; times in UTC</caption>
      <thead><tr><th scope="col">Run</th><th scope="col">Started</th><th scope="col">Status</th><th scope="col" class="number">Checked</th><th scope="col" class="number">Drifted</th><th scope="col" class="number">New</th><th scope="col" class="number">Corrected</th><th scope="col" class="number">Overstated</th><th scope="col" class="number">Understated</th><th scope="col" class="number">Explained</th></tr></thead>
      <tbody>
% for column in columns.columns:
<% run = column.run %>
        <tr><th scope="row">${run.id}</th><td>${show(run.started_at)}</td><td>${run.status}</td><td class="number">${show(run.checked)}</td><td class="number">${show(run.drifted)}</td><td class="number">${show(run.found_new)}</td><td class="number">${show(run.corrected)}</td><td class="number">${show(run.tokens_overstated)}</td><td class="number">${show(run.tokens_understated)}</td><td class="number">${percent(run.share_explained)}</td></tr>
% endfor
      </tbody>
    </table>
    </div>
  </details>
</section>
% endif
% if report.causes:
<div class="pair">
<section class="card" aria-labelledby="causes">
  <h2 id="causes">Causes</h2>
  <p class="legend"><span class="o">overstated</span><span class="u">understated</span></p>
  <table class="bars causes">
    <caption class="hidden">Tokens of each cause</caption>
    <thead><tr><th scope="col">Cause</th><th scope="col"><span class="hidden">Share</span></th><th scope="col" class="number">Drifts</th><th scope="col" class="number">Tokens</th></tr></thead>
    <tbody>
% for figures, (over, under) in zip(report.causes, causes):
      <tr><th scope="row">${cause_title(figures.cause)}<small>${cause_sentence(figures.cause)}</small></th>
        <td class="bar"><svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"><rect class="track" width="100" height="10"/><rect class="o" width="${over}" height="10"/><rect class="u" x="${over}" width="${under}" height="10"/></svg></td>
        <td class="number">${show(figures.drifts)}</td><td class="number" title="${show(figures.tokens)}">${compact(figures.tokens)}</td></tr>
% endfor
    </tbody>
  </table>
</section>
<section class="card" aria-labelledby="sizes">
  <h2 id="sizes">Sizes</h2>
  <p class="legend"><span class="o">overstated</span><span class="u">understated</span></p>
  <table class="bars sizes">
    <caption class="hidden">Drifts by size</caption>
    <thead><tr><th scope="col">Tokens</th><th scope="col"><span class="hidden">Share</span></th><th scope="col" class="number">Drifts</th></tr></thead>
    <tbody>
% for figures, (over, under) in zip(report.sizes, sizes):
      <tr><th scope="row">${size_label(figures.at_least)}</th>
        <td class="bar"><svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"><rect class="track" width="100" height="10"/><rect class="o" width="${over}" height="10"/><rect class="u" x="${over}" width="${under}" height="10"/></svg></td>
        <td class="number">${show(figures.overstated + figures.understated)}</td></tr>
% endfor
    </tbody>
  </table>
  <h2 class="next" id="actions">What was done</h2>
  <table class="bars sizes" aria-labelledby="actions">
    <thead class="hidden"><tr><th scope="col">Action</th><th scope="col">Share</th><th scope="col">Drifts</th></tr></thead>
    <tbody>
% for (action, drifts), (width, _) in zip(report.actions.items(), actions):
      <tr><th scope="row" title="${action_sentence(action)}">${action.replace("_", " ")}</th>
        <td class="bar"><svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"><rect class="track" width="100" height="10"/><rect class="done" width="${width}" height="10"/></svg></td>
        <td class="number">${show(drifts)}</td></tr>
% endfor
    </tbody>
  </table>
</section>
</div>
% endif
<section class="card" aria-labelledby="rows">
  <div class="tools">
    <div>
      <h2 id="rows">${"Largest drifts" if report.rows_left_out else "Drifts"}</h2>
      <p class="soft">
% if report.rows_left_out:
        ${show(len(report.rows))} of ${show(report.drifted)}.
% endif
        Drift = counter − expected. Choose a column to sort by it.</p>
    </div>
    <label id="filter-label" hidden>Filter <input id="filter" type="search" placeholder="user, cause, action" autocomplete="off"></label>
  </div>
% if not report.rows:
  <p>No drift: every counter is right.</p>
% else:
  <table class="drifts" id="drifts" role="table" aria-labelledby="rows">
    <thead role="rowgroup"><tr role="row">
% for name, kind in (("User", "text"), ("Counter", "number"), ("Expected", "number"), ("Drift", "number"), ("Cause", "text"), ("Certainty", "text"), ("Action", "text"), ("First seen", "number")):
      <th scope="col" role="columnheader" data-kind="${kind}" class="${kind}"><button type="button">${name}</button></th>
% endfor
      <th scope="col" role="columnheader"><span class="hidden">Evidence</span></th>
    </tr></thead>
    <tbody role="rowgroup">
% for row in report.rows:
<%
    direction = "over" if row.drift > 0 else "under"
    done = row.decision or row.action
%>
      <tr role="row" class="drift" data-text="${row.user_id} ${cause_title(row.cause)} ${row.certainty} ${row.action.replace("_", " ")} ${row.decision or ""}">
        <th scope="row" role="rowheader" data-label="User" data-value="${row.user_id}"><bdi>${show(str(row.user_id))}</bdi></th>
        <td role="cell" class="number" data-label="Counter" data-value="${"" if row.observed is None else row.observed}">${"null" if row.observed is None else show(row.observed)}</td>
        <td role="cell" class="number" data-label="Expected" data-value="${row.expected}">${show(row.expected)}</td>
        <td role="cell" class="number ${direction}" data-label="Drift" data-value="${row.drift}">${signed(row.drift)}</td>
        <td role="cell" data-label="Cause" data-value="${row.cause}" title="${cause_sentence(row.cause)}">${cause_title(row.cause)}</td>
        <td role="cell" data-label="Certainty" data-value="${row.certainty}" title="${certainty_sentence(row.certainty)}">${row.certainty}</td>
        <td role="cell" data-label="Action" data-value="${done}"><span class="tag ${row.action}" title="${action_sentence(row.action)}">${row.action.replace("_", " ")}${f": {row.decision}" if row.decision else ""}</span></td>
        <td role="cell" class="number" data-label="First seen" data-value="${stamp(row.found_at)}">${show(row.found_at)[:16]}</td>
        <td role="cell" class="open"><button type="button" aria-expanded="true" hidden>Evidence</button></td>
      </tr>
      <tr role="row" class="more"><td role="cell" colspan="9"><div class="evidence">
        <p>${sentence(action_sentence(row.action))}${f" ({cause_title(row.reason)})" if row.reason else ""}.
          ${sentence(certainty_sentence(row.certainty))}.
% if row.last_run_id is not None and row.last_run_id != row.run_id:
          First seen by run ${row.run_id}, last by run ${row.last_run_id}.
% endif
        </p>
% for part in row.evidence.get("components") or []:
        <p><b>${signed(part["tokens"])}</b> ${cause_title(part["cause"])}, ${part["certainty"]}: ${cause_sentence(part["cause"])}.</p>
% endfor
        <pre>${pretty(row.evidence)}</pre>
      </div></td>
      </tr>
% endfor
    </tbody>
  </table>
% endif
</section>
<p class="hidden" id="said" role="status"></p>
</main>
<footer>Made by trueup. Times are UTC. This page needs no network and sends nothing.</footer>
<script>
${script | n}</script>
</body>
</html>
